"""The group of workers as TensorFlow sees it: the strategy, and agreement between ranks.

Owns the choice of strategy (none for one worker), pinned collectives (RING on CPU, NCCL on GPU:
AUTO picks by circumstances and with it the order of sums), and collectives on plain values. All
ranks must call these in the same order.
"""

import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray


class Group:
    """This process's membership in a group of workers.

    Args:
        rank: Own number.
        addresses: `host:port` of each rank.
        cpus: Cores this process may use.
    """

    def __init__(self, rank: int, addresses: Sequence[str], cpus: int) -> None:
        self.rank = rank
        self.size = len(addresses)
        tf.config.threading.set_intra_op_parallelism_threads(cpus)
        tf.config.threading.set_inter_op_parallelism_threads(max(2, cpus))
        gpus = tf.config.list_physical_devices("GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        self.strategy = self._form(addresses, bool(gpus))
        self.replicas = int(self.strategy.num_replicas_in_sync)
        self._sum = tf.function(self._sum_in_graph, reduce_retracing=True)

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """The sum over all ranks, the same on each; a collective."""
        if self.size == 1 or values.size == 0:  # the ring collective crashes on nothing
            return values
        return np.asarray(self._sum(tf.constant(values.ravel()))).reshape(values.shape)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (plain, picklable) on every rank; a collective."""
        if self.size == 1:
            return value
        data = pickle.dumps(value) if self.rank == 0 else b""
        length = int(self.sum(np.array([len(data)], np.int32))[0])
        words = np.zeros(math.ceil(length / 4), np.int32)
        if self.rank == 0:
            words.view(np.uint8)[:length] = np.frombuffer(data, np.uint8)
        return pickle.loads(self.sum(words).tobytes()[:length])

    def gather(self, values: NDArray[Any]) -> NDArray[Any]:
        """`(size, *values.shape)`: every rank's values, on every rank; a collective."""
        table = np.zeros((self.size, *values.shape), values.dtype)
        table[self.rank] = values
        return self.sum(table)

    def _form(self, addresses: Sequence[str], has_gpu: bool) -> tf.distribute.Strategy:
        if self.size == 1:
            return tf.distribute.get_strategy()
        communication = tf.distribute.experimental.CommunicationImplementation
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": list(addresses)}),
            task_type="worker",
            task_id=self.rank,
            rpc_layer="grpc",
        )
        return tf.distribute.MultiWorkerMirroredStrategy(
            cluster_resolver=resolver,
            communication_options=tf.distribute.experimental.CommunicationOptions(
                implementation=communication.NCCL if has_gpu else communication.RING
            ),
        )

    def _sum_in_graph(self, values: tf.Tensor) -> tf.Tensor:
        def reduce(own: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            first = context.replica_id_in_sync_group % (self.replicas // self.size) == 0
            return context.all_reduce("SUM", tf.identity(own) if first else tf.zeros_like(own))

        return self.strategy.experimental_local_results(self.strategy.run(reduce, args=(values,)))[
            0
        ]
