"""What a job is: the typed, frozen schema behind every job file.

Owns the meaning, the units and the defaults of every field. It knows no Keras and reads no files:
names of layers, losses and the like are checked against the catalogue (`configs.catalog`), what the
data holds is checked by the packages that read it. `configs.load` turns YAML into a `Job`.
"""

import warnings
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from configs.data import DataConfig
from configs.section import (
    CallbackSpec,
    LayerSpec,
    LossSpec,
    MetricSpec,
    OptimizerSpec,
    PositiveInt,
    Section,
)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class ModelConfig(Section):
    """Where the Keras model comes from: exactly one of `layers`, `builder` and `file`."""

    layers: list[LayerSpec] | None = Field(
        None,
        description="Layers of a Sequential model in order, each a class name of keras.layers or a "
        "mapping of the class name to its arguments. The input comes from the data.",
        min_length=1,
    )
    builder: str | None = Field(
        None,
        description="A function that returns a Keras model, compiled or not: "
        "'package.module:function' or 'path/to/file.py:function'.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments for the builder."
    )
    file: str | None = Field(
        None,
        description="A model to go on from, weights included: a .keras or .h5 file, or a "
        "registered version as NAME/NUMBER, NAME@ALIAS or NAME (its champion).",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("layers", "builder", "file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"received {' and '.join(given) or 'no source of the model'}; exactly one "
                "of layers, builder and file describes the model. Keep one of them."
            )
        if self.arguments and self.builder is None:
            raise ValueError("arguments has no effect without builder. Remove arguments.")
        return self


class CompileConfig(Section):
    """What `model.compile` receives."""

    optimizer: OptimizerSpec = Field("adam", description="Optimizer, by name or with arguments.")
    loss: LossSpec = Field(description="Loss, by name or with arguments.")
    metrics: list[MetricSpec] = Field(
        default_factory=list, description="Metrics that ignore the weight column."
    )
    weighted_metrics: list[MetricSpec] = Field(
        default_factory=list, description="Metrics that apply the weight column."
    )
    loss_weights: float | None = Field(
        None, description="Factor of the loss. null: 1.", allow_inf_nan=False
    )


class TrainConfig(Section):
    """The training itself."""

    epochs: PositiveInt = Field(description="Passes over the training rows.")
    global_batch_size: PositiveInt = Field(
        description="Rows of one step, over all workers together; it does not change with their "
        "number."
    )
    seed: int = Field(0, description="Seed of weights, order and dropout.", ge=0, lt=2**31)
    callbacks: list[CallbackSpec] = Field(
        default_factory=list,
        description="Keras callbacks by name or with arguments; the user's own as "
        "'package.module:Class' or 'path/to/file.py:Class'.",
    )
    class_weight: dict[int, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(
        None,
        description="Weight in the training loss of the rows of each class, such as {0: 1, 1: 5}; "
        "classes that are not named count 1. null: all count 1.",
        min_length=1,
    )
    sync_batch_norm: bool = Field(
        False,
        description="BatchNormalization normalises by the statistics of the global batch, not of "
        "each worker's part of it: the result is that of one worker. Costs a collective a layer.",
    )
    max_time_s: float | None = Field(
        None,
        description="Training ends after so many seconds of it, at a common step of all workers, "
        "and the run goes on to evaluation and export. null: no bound.",
        gt=0,
        allow_inf_nan=False,
    )
    validation_freq: PositiveInt = Field(
        1, description="Epochs from one evaluation on data.validation to the next."
    )
    steps_per_execution: int = Field(
        0,
        description="Steps in one call of the compiled loop. 0: chosen while training, so that a "
        "call takes about a third of a second.",
        ge=0,
    )
    jit_compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compute each worker's gradients by XLA, which compiles anew for each number "
        "of rows that a worker gets. auto: where it is faster for certain, that is for recurrent "
        "layers on CPUs. Takes the place of compile's argument of this name.",
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type in which gradients travel between workers. bfloat16 halves the traffic "
        "and rounds each gradient to 8 bits of precision.",
    )
    dtype_policy: Literal["float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "float32", description="Keras dtype policy of the layers."
    )


class ClusterConfig(Section):
    """The processes that train."""

    workers: PositiveInt = Field(1, description="Training processes.")
    cpus_per_worker: PositiveInt = Field(1, description="Cores reserved for each worker.")
    gpus_per_worker: int = Field(
        0,
        description="GPUs reserved for each worker. 1: one process a GPU; with more a worker's "
        "rows are split over its GPUs.",
        ge=0,
    )
    cpu_devices_per_worker: PositiveInt = Field(
        1,
        description="Virtual CPU devices that a worker's rows are split over, as over several "
        "GPUs: to try out on a CPU what several devices do.",
        le=64,
    )
    start_timeout_s: float = Field(
        120.0, description="Longest wait for machines, and for a gang to form, in seconds.", gt=0
    )
    min_workers: PositiveInt | None = Field(
        None,
        description="Fewest workers to begin or go on with when there is no room for all, or hosts "
        "are lost and nothing replaces them; the run grows when there is capacity. null: as many "
        "as workers, never fewer.",
    )
    standbys: int = Field(
        0,
        description="Spare hosts that are kept warm, on other nodes where there are any, to take "
        "the place of a lost one. Each reserves the resources of a worker.",
        ge=0,
    )
    replace_timeout_s: float = Field(
        30.0,
        description="Longest wait, in seconds, for a lost host to be replaced, or for room for all "
        "workers at the start; then fewer go on where min_workers allows it.",
        gt=0,
    )
    stall_after_s: float = Field(
        300.0,
        description="A gang in which nothing goes on for so many seconds counts as stalled: the "
        "worker that is behind is named, and all are replaced.",
        gt=0,
    )
    max_failures: int = Field(
        5,
        description="Failures within failure_window_s that are answered by forming the gang anew; "
        "one more ends the run with status 3. It can be resumed.",
        ge=0,
    )
    failure_window_s: float = Field(
        600.0, description="Seconds over which max_failures counts.", gt=0
    )


class CheckpointConfig(Section):
    """When training state is written, and how much of it is kept."""

    uri: str | None = Field(
        None,
        description="Where checkpoints are written: a folder or a URI such as s3://bucket/prefix; "
        "<job name>/<run id>/ is added. null: checkpoints/ in the run folder.",
        min_length=1,
    )
    every_steps: int = Field(
        0, description="Steps between checkpoints inside an epoch. 0: at epoch ends only.", ge=0
    )
    snapshot_every_s: float = Field(
        5.0,
        description="Seconds between copies of the training state in the coordinator's memory, "
        "from which a run goes on when a worker dies. 0: checkpoints only.",
        ge=0,
        allow_inf_nan=False,
    )
    keep: PositiveInt = Field(3, description="Newest checkpoints that are kept.")
    best_by: str | None = Field(
        None,
        description="Metric, such as val_mae, whose best checkpoint at an epoch's end is kept as "
        "well. null: the newest only.",
        min_length=1,
    )
    best_mode: Literal["auto", "min", "max"] = Field(
        "auto", description="Whether less or more of best_by is better. auto: by the name."
    )


with warnings.catch_warnings():
    # pydantic warns of `register` as if instances had that method; only their metaclass has it
    warnings.filterwarnings("ignore", 'Field name "register"', UserWarning)

    class ExportConfig(Section):
        """What the artifact holds."""

        h5: bool = Field(True, description="Write trained_model.h5 beside model.keras.")
        saved_model: bool = Field(
            True, description="Write saved_model/, which takes raw columns by name."
        )
        register: str | None = Field(
            None,
            description="The model whose next version the finished artifact becomes. null: the "
            "artifact stays in the run folder only.",
            pattern=NAME_PATTERN,
        )


class TrackingConfig(Section):
    """Where a run is recorded besides its folder. It never decides how a run goes."""

    mlflow_uri: str | None = Field(
        None,
        description="MLflow's address: http://, https://, file:/FOLDER or databricks; or env:NAME, "
        "the environment variable that holds it, for an address with a password. User, password "
        "and token can also come from MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and "
        "MLFLOW_TRACKING_TOKEN. Needs the extra `mlflow`. null: nothing is sent.",
    )
    experiment: str | None = Field(
        None, description="MLflow's experiment. null: the name of the job.", min_length=1
    )
    tags: dict[str, str] = Field(
        default_factory=dict, description="Tags of the MLflow run, besides Lockstep's own."
    )
    log_model: bool = Field(
        False, description="Send the whole artifact, models included, not only what describes it."
    )
    timeout_s: float = Field(
        10.0,
        description="Longest wait, in seconds, at the end of a run for what is not delivered yet.",
        ge=0,
        le=3600,
        allow_inf_nan=False,
    )

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if self.mlflow_uri is None:
            given = [name for name in ("experiment", "tags", "log_model") if getattr(self, name)]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} without mlflow_uri has no effect. Set mlflow_uri, or "
                    "remove it."
                )
            return self
        _check_mlflow_uri(self.mlflow_uri)
        return self


_MLFLOW_SCHEMES = ("http", "https", "file", "databricks", "env")


def _check_mlflow_uri(uri: str) -> None:
    """Refuse what no MLflow is at, and secrets: the text of a job is kept in many places."""
    scheme = uri.partition(":")[0]
    if scheme not in _MLFLOW_SCHEMES or (scheme == uri and scheme != "databricks"):
        raise ValueError(
            "mlflow_uri begins with none of http://, https://, file:, databricks and env:NAME. "
            "Correct it."
        )
    if scheme == "file" and not uri.startswith("file:/"):
        raise ValueError(
            f"mlflow_uri={uri} is no absolute path; file:/FOLDER is allowed. Name the folder from "
            "the root, one that all machines see."
        )
    if scheme in ("http", "https") and ("@" in uri or "?" in uri):
        raise ValueError(
            "mlflow_uri holds a user, a password or a query, which would be kept with the job. "
            "Put the address into an environment variable and name it: mlflow_uri: env:NAME."
        )


class Job(Section):
    """One training job: model, data, training, and the processes to run it on."""

    name: str = Field(
        description="Names the run folder and the model: letters, digits, '_', '-' and '.'.",
        pattern=NAME_PATTERN,
    )
    model: ModelConfig
    compile: CompileConfig | None = Field(
        None,
        description="null: the builder or the file gives a compiled model.",
    )
    data: DataConfig
    train: TrainConfig
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    runs_dir: str = Field("runs", description="Folder that holds runs/<name>/<run_id>/.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.compile is None and self.model.layers is not None:
            raise ValueError("compile is missing; layers need at least compile.loss. Add compile.")
        workers = self.cluster.workers
        if workers > self.data.virtual_shards:
            raise ValueError(
                f"data.virtual_shards={self.data.virtual_shards} cannot feed {workers} workers: "
                "each worker needs at least one. Set data.virtual_shards to "
                f"{workers} or more, or cluster.workers to {self.data.virtual_shards} or fewer."
            )
        if self.train.global_batch_size < workers:
            raise ValueError(
                f"train.global_batch_size={self.train.global_batch_size} is smaller than "
                f"cluster.workers={workers}: some workers would never have a row. Set "
                f"train.global_batch_size to {workers} or more, or use fewer workers."
            )
        self._check_effects(workers)
        self._check_survival()
        return self

    def _check_survival(self) -> None:
        """Refuse bounds that contradict each other, and settings that would do nothing."""
        cluster, checkpoint = self.cluster, self.checkpoint
        if cluster.min_workers is not None and cluster.min_workers > cluster.workers:
            raise ValueError(
                f"cluster.min_workers={cluster.min_workers} is more than cluster.workers="
                f"{cluster.workers}, the most there will be. Set it to {cluster.workers} or fewer."
            )
        if checkpoint.best_mode != "auto" and checkpoint.best_by is None:
            raise ValueError(
                f"checkpoint.best_mode={checkpoint.best_mode} has no effect without "
                "checkpoint.best_by. Remove it, or name a metric."
            )

    def _check_effects(self, workers: int) -> None:
        """Refuse settings that would do nothing, and weights of both kinds at once."""
        cluster, train = self.cluster, self.train
        if train.class_weight is not None and self.data.weight is not None:
            raise ValueError(
                f"train.class_weight and data.weight={self.data.weight} both weigh rows; one of "
                "them is allowed. Multiply the class weights into the column."
            )
        if train.class_weight and min(train.class_weight) < 0:
            raise ValueError(
                f"train.class_weight names class {min(train.class_weight)}; classes count from 0. "
                "Remove it."
            )
        if cluster.gpus_per_worker and cluster.cpu_devices_per_worker > 1:
            raise ValueError(
                f"cluster.cpu_devices_per_worker={cluster.cpu_devices_per_worker} has no effect "
                "with GPUs. Remove it, or set cluster.gpus_per_worker to 0."
            )
        if train.validation_freq > 1 and self.data.validation is None:
            raise ValueError(
                f"train.validation_freq={train.validation_freq} has no effect without "
                "data.validation. Remove it, or name validation files."
            )
        devices = cluster.gpus_per_worker or cluster.cpu_devices_per_worker
        if train.reduce_dtype != "float32" and workers * devices == 1:
            raise ValueError(
                f"train.reduce_dtype={train.reduce_dtype} has no effect with one worker. "
                "Remove it, or set cluster.workers to 2 or more."
            )
