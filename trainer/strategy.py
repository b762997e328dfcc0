"""The group of workers as TensorFlow sees it: the strategy, replicas, and agreement between ranks.

Owns the choice of strategy (none for one worker of one device), pinned collectives (RING on CPU,
NCCL on GPU: AUTO picks by circumstances and with it the order of sums), the step aside from the
strategy in which a replica runs plain Keras, and collectives on plain values. All ranks must call
these in the same order. What is private to TensorFlow is touched here alone.
"""

import contextlib
import math
import pickle
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.distribute import collective_all_reduce_strategy, distribute_lib

from trainer import keras_adapter

_THREAD = threading.local()


class Group:
    """This process's membership in a group of workers.

    Args:
        rank: Own number.
        addresses: `host:port` of each rank.
        cpus: Cores this process may use.
        cpu_devices: Virtual CPU devices to split this worker's rows over; GPUs, where there are
            any, are taken as they are.
    """

    def __init__(
        self, rank: int, addresses: Sequence[str], cpus: int, cpu_devices: int = 1
    ) -> None:
        self.rank = rank
        self.size = len(addresses)
        tf.config.threading.set_intra_op_parallelism_threads(cpus)
        tf.config.threading.set_inter_op_parallelism_threads(max(2, cpus, cpu_devices))
        gpus = tf.config.list_physical_devices("GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if not gpus and cpu_devices > 1:
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * cpu_devices,
            )
        self.devices = len(gpus) or cpu_devices
        self.no_strategy = tf.distribute.get_strategy()
        self.strategy = self._form(addresses, bool(gpus))
        self.replicas = int(self.strategy.num_replicas_in_sync)
        self._sum = tf.function(self.sum_in_graph, reduce_retracing=True)

    @property
    def first_replica(self) -> int:
        """Number of this worker's first replica among all."""
        return self.rank * self.devices

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

    @contextlib.contextmanager
    def copies(self, variables: Sequence[Any], device: int) -> Iterator[None]:
        """Let Keras variables be this worker's copies on one device; outside of the scope."""
        shared = [keras_adapter.held(variable) for variable in variables]
        for variable, native in zip(variables, shared, strict=True):
            if isinstance(native, tf.distribute.DistributedValues):
                keras_adapter.hold(variable, native.values[device])
        try:
            yield
        finally:
            for variable, native in zip(variables, shared, strict=True):
                keras_adapter.hold(variable, native)

    def sum_in_graph(self, values: tf.Tensor) -> tf.Tensor:
        """The sum of one tensor of each rank, while a function is traced; a collective."""

        def reduce(own: tf.Tensor) -> tf.Tensor:
            replica = Replica(self, ())
            return replica.sum(own if replica.number % self.devices == 0 else tf.zeros_like(own))

        return self.strategy.experimental_local_results(self.strategy.run(reduce, args=(values,)))[
            0
        ]

    def _form(self, addresses: Sequence[str], has_gpu: bool) -> tf.distribute.Strategy:
        if self.size * self.devices == 1:
            return tf.distribute.get_strategy()
        communication = tf.distribute.experimental.CommunicationImplementation
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": list(addresses)}),
            task_type="worker",
            task_id=self.rank,
            rpc_layer="grpc",
        )
        with _virtual_cpus(0 if has_gpu else self.devices):
            return tf.distribute.MultiWorkerMirroredStrategy(
                cluster_resolver=resolver,
                communication_options=tf.distribute.experimental.CommunicationOptions(
                    implementation=communication.NCCL if has_gpu else communication.RING
                ),
            )


class Replica:
    """One replica while its part of a step is traced; make it inside `strategy.run`.

    Within `with replica.alone():` there is no strategy: each Keras variable is this device's own
    copy, and whatever Keras does is what it does in a single process. `sum` leaves that state for
    the time of the collective. Copies stay equal as long as all replicas apply equal updates.

    Args:
        group: The group.
        variables: Keras variables that are switched; without repetition.

    Attributes:
        number: Among all replicas of the group.
        replicas: How many there are.
        is_empty: Whether it has no rows in this step, a tensor; None where it has for certain.
    """

    def __init__(self, group: Group, variables: Sequence[Any]) -> None:
        self.replicas = group.replicas
        self.is_empty: tf.Tensor | None = None
        self._context = tf.distribute.get_replica_context()
        self.number = int(self._context._replica_id_in_sync_group) if group.replicas > 1 else 0
        self._shared: list[tuple[Any, Any, Any]] = []
        for variable in variables:
            native = keras_adapter.held(variable)
            if isinstance(native, tf.distribute.DistributedValues):
                copy = native.values[self.number % group.devices]
                self._shared.append((variable, native, copy))

    @staticmethod
    def current() -> "Replica | None":
        """The replica that is alone in this thread, one of several."""
        found: Replica | None = getattr(_THREAD, "replica", None)
        return found

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Plain Keras on this replica's own variables."""
        if self.replicas == 1:
            yield
            return
        _THREAD.replica = self
        self._switch(to_own=True)
        distribute_lib._push_per_thread_mode(distribute_lib._get_default_replica_mode())
        try:
            yield
        finally:
            distribute_lib._pop_per_thread_mode()
            self._switch(to_own=False)
            _THREAD.replica = None

    def sum(self, values: Any) -> Any:
        """Sums over all replicas of a tensor or of a list of tensors; a collective.

        Works inside `alone` and outside of it. Not differentiable.
        """
        if self.replicas == 1:
            return values
        if not isinstance(values, list):
            return self.sum([values])[0]
        is_alone = not distribute_lib.has_strategy()
        if is_alone:
            # Replicas are traced in turn: at a collective the next one takes over.
            self._switch(to_own=False)
            distribute_lib._push_per_thread_mode(self._context._thread_context)
        try:
            summed = list(values)
            for dtype in dict.fromkeys(value.dtype for value in values):  # a pack has one type
                places = [index for index, value in enumerate(values) if value.dtype == dtype]
                # The copy gives a value a device, by which the strategy finds where to reduce.
                pack = [tf.identity(values[index]) for index in places]
                for index, total in zip(places, self._context.all_reduce("SUM", pack), strict=True):
                    summed[index] = total
            return summed
        finally:
            if is_alone:
                distribute_lib._pop_per_thread_mode()
                self._switch(to_own=True)

    def slot(self, own: tf.Tensor) -> tf.Tensor:
        """`(replicas, *own.shape)`: zeros but for this replica's own values; to be summed."""
        around = [[self.number, self.replicas - 1 - self.number]]
        return tf.pad(own[None], around + [[0, 0]] * len(own.shape))

    def _switch(self, to_own: bool) -> None:
        for variable, shared, own in self._shared:
            keras_adapter.hold(variable, own if to_own else shared)


@contextlib.contextmanager
def _virtual_cpus(devices: int) -> Iterator[None]:
    """Let a strategy that is made meanwhile use so many CPU devices; by itself it takes one."""
    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    original = extended._initialize_local_devices

    def local_devices(_: Any, __: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{index}" for index in range(devices)), "CPU"

    if devices > 1:
        extended._initialize_local_devices = local_devices
    try:
        yield
    finally:
        extended._initialize_local_devices = original
