"""What a job is: the typed, frozen schema behind every job file.

Owns the meaning, the units and the defaults of every field. It knows no Keras and reads no files:
names of layers, losses and the like are checked against the catalogue (`configs.catalog`), what the
data holds is checked by the packages that read it. `configs.load` turns YAML into a `Job`.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from configs.catalog import check_spec

KerasSpec = str | dict[str, Any]
"""A Keras object: its name, or a mapping of its class name to its arguments."""


def _known(kind: str) -> Callable[[KerasSpec], KerasSpec]:
    """A validator that refuses names and arguments that `keras.<kind>` does not have."""

    def check(spec: KerasSpec) -> KerasSpec:
        check_spec(kind, spec)
        return spec

    return check


LayerSpec = Annotated[KerasSpec, AfterValidator(_known("layers"))]
LossSpec = Annotated[KerasSpec, AfterValidator(_known("losses"))]
MetricSpec = Annotated[KerasSpec, AfterValidator(_known("metrics"))]
OptimizerSpec = Annotated[KerasSpec, AfterValidator(_known("optimizers"))]
CallbackSpec = Annotated[KerasSpec, AfterValidator(_known("callbacks"))]

Paths = str | list[str]
"""A file, a folder, a glob, or a list of these."""

PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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
        None, description="A .keras or .h5 model to go on from, weights included."
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


TimePart = Literal["year", "month", "day", "weekday", "day_of_year", "hour", "minute", "second"]


class FeatureConfig(Section):
    """One input column."""

    name: str = Field(description="The column's name in the files.")
    kind: Literal["numeric", "categorical", "text", "timestamp"] | None = Field(
        None,
        description="How values become numbers. null: by the column's type: numbers and booleans "
        "are numeric, strings categorical, dates and timestamps timestamp.",
    )
    shape: list[PositiveInt] | None = Field(
        None,
        description="Shape of one row's value for a list column, such as [28, 28, 1]. null: a "
        "scalar for a scalar column, a vector for a list column.",
    )
    normalize: bool | None = Field(
        None,
        description="Shift and scale this column to mean 0 and variance 1 (over the last axis of "
        "its shape). null: what data.normalize says. Numbers only.",
    )
    vocabulary_size: PositiveInt | None = Field(
        None,
        description="The most values (categorical) or words (text) that are told apart, the most "
        "frequent ones of the training rows; all others count as unknown. null: 10,000.",
        le=2**23,
    )
    encoding: Literal["one_hot", "multi_hot", "count", "embedding", "index"] | None = Field(
        None,
        description="What the model sees of a categorical (one_hot, embedding, index) or a text "
        "(multi_hot, count, embedding, index). embedding: a trained vector of embedding_size, the "
        "mean of the words' for a text. index: the number itself. null: one_hot, or multi_hot.",
    )
    embedding_size: PositiveInt | None = Field(
        None, description="Numbers of an embedding. null: 8. With encoding: embedding only."
    )
    sequence_length: PositiveInt | None = Field(
        None, description="Words of a text that are read, from its start. null: 64. Text only."
    )
    parts: list[TimePart] | None = Field(
        None,
        description="What is told of a timestamp. null: month, weekday and hour. Timestamps only.",
        min_length=1,
    )
    cyclic: bool | None = Field(
        None,
        description="Parts that repeat become a sine and a cosine, so that midnight is near to one "
        "o'clock; false: plain numbers. null: true. Timestamps only.",
    )

    @model_validator(mode="after")
    def _settings_fit_kind(self) -> Self:
        """Refuse what has no effect; a kind that only the file tells is checked there."""
        if self.kind is not None:
            check_settings(self, self.kind)
        if self.embedding_size is not None and self.encoding != "embedding":
            raise ValueError(
                f"embedding_size={self.embedding_size} has no effect with encoding: "
                f"{self.encoding}. Remove it, or set encoding: embedding."
            )
        if self.parts is not None and len(set(self.parts)) < len(self.parts):
            raise ValueError(f"received parts {self.parts}; each once is allowed.")
        return self


_SETTINGS_OF_KIND: dict[str, tuple[str, ...]] = {
    "numeric": ("shape", "normalize"),
    "categorical": ("vocabulary_size", "encoding", "embedding_size"),
    "text": ("vocabulary_size", "encoding", "embedding_size", "sequence_length"),
    "timestamp": ("parts", "cyclic", "normalize"),
}
_ENCODINGS_OF_KIND = {
    "categorical": ("one_hot", "embedding", "index"),
    "text": ("multi_hot", "count", "embedding", "index"),
}


def check_settings(feature: FeatureConfig, kind: str) -> None:
    """Refuse settings of a feature that have no effect for its kind.

    Raises ValueError.
    """
    allowed = _SETTINGS_OF_KIND[kind]
    given = feature.model_dump(exclude={"name", "kind"}, exclude_none=True)
    wrong = [setting for setting in given if setting not in allowed]
    if wrong:
        raise ValueError(
            f"{wrong[0]} has no effect on column {feature.name!r}, which is {kind}; "
            f"{', '.join(allowed)} are allowed. Remove it, or set another kind."
        )
    encodings = _ENCODINGS_OF_KIND.get(kind, ())
    if feature.encoding is not None and feature.encoding not in encodings:
        raise ValueError(
            f"encoding: {feature.encoding} is not for column {feature.name!r}, which is {kind}; "
            f"{', '.join(encodings)} are allowed."
        )


def _named(entry: Any) -> Any:
    return {"name": entry} if isinstance(entry, str) else entry


Feature = Annotated[
    FeatureConfig, BeforeValidator(_named, json_schema_input_type=str | FeatureConfig)
]


class ImagesConfig(Section):
    """Folders of images: how they become rows with the columns `image`, `label` and `path`."""

    height: PositiveInt = Field(description="Rows of pixels; images of another size are resized.")
    width: PositiveInt = Field(description="Columns of pixels.")
    channels: Literal[1, 3] = Field(3, description="1: grey. 3: red, green, blue.")
    labels: str | None = Field(
        None,
        description="A CSV file with the columns `path` (below the folder) and `label`. null: the "
        "name of the folder an image is in is its label.",
    )


class DataConfig(Section):
    """The rows: where they are, which columns count, and how they are ordered."""

    train: Paths = Field(
        description="Training files: a path, a folder, a glob, or a list; local, or on an object "
        "store (s3://, gs://, abfs://, hdfs://)."
    )
    validation: Paths | None = Field(
        None, description="Rows to evaluate on after each epoch. null: none."
    )
    test: Paths | None = Field(
        None, description="Rows to evaluate on once, at the end. null: none."
    )
    features: list[Feature] = Field(
        description="Input columns in order, as names or with details.", min_length=1
    )
    label: str = Field(description="The column to predict.")
    weight: str | None = Field(
        None, description="Column with each row's weight in the loss and weighted metrics."
    )
    format: Literal["auto", "parquet", "csv", "ndjson", "arrow", "tfrecord", "numpy", "images"] = (
        Field(
            "auto",
            description="What the files are. auto: told by their suffixes. All but Parquet are "
            "converted once into data.ingest_dir, and again when they change.",
        )
    )
    images: ImagesConfig | None = Field(
        None, description="How folders of images are read. Needed with images, else null."
    )
    on_bad_rows: Literal["error", "skip"] = Field(
        "error",
        description="What a CSV or NDJSON line that cannot be read does: stop with its number, or "
        "be left out, counted, and written to a file of skipped lines.",
    )
    ingest_dir: str | None = Field(
        None,
        description="Folder of converted data; hosts of all workers must reach it. null: "
        "`ingested` below LOCKSTEP_HOME (~/.lockstep).",
    )
    augment: list[LayerSpec] = Field(
        default_factory=list,
        description="Keras layers that vary images in training only, such as RandomFlip. They see "
        "values as they stand in the files, before normalisation.",
    )
    normalize: bool = Field(
        False,
        description="Normalise all numeric features with statistics computed once, exactly, over "
        "the training rows; they travel inside the model.",
    )
    on_null: Literal["error", "drop", "zero"] = Field(
        "error",
        description="What a null or NaN in a feature, the label or the weight does: stop with an "
        "error, drop the row, or count as zero (features only; labels and weights always stop).",
    )
    shuffle: Literal["none", "window", "full"] = Field(
        "window",
        description="none: file order. window: blocks are permuted, rows shuffled inside windows. "
        "full: one window is a whole virtual shard (holds all rows of a worker in memory).",
    )
    virtual_shards: PositiveInt = Field(
        16,
        description="Number of equal parts of each epoch's rows that workers own whole; the "
        "greatest possible number of workers.",
        le=65536,
    )
    window_rows: int = Field(
        0, description="Rows in a shuffle window. 0: chosen from the size of a row.", ge=0
    )
    cache_mb: int = Field(
        512, description="Decoded data a worker keeps between epochs, in MiB. 0: none.", ge=0
    )

    @field_validator("features")
    @classmethod
    def _features_once(cls, features: list[FeatureConfig]) -> list[FeatureConfig]:
        names = [feature.name for feature in features]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"received {twice} more than once. Name each column once.")
        return features

    @model_validator(mode="after")
    def _roles_differ(self) -> Self:
        names = [feature.name for feature in self.features]
        for role in ("label", "weight"):
            column = getattr(self, role)
            if column is not None and column in names:
                raise ValueError(
                    f"column {column!r} is both {role} and feature; it can be one of them. "
                    f"Take it out of features."
                )
        if self.label == self.weight:
            raise ValueError(f"column {self.label!r} is both label and weight. Name two columns.")
        if self.window_rows and self.shuffle != "window":
            raise ValueError(
                f"window_rows={self.window_rows} has no effect with shuffle: {self.shuffle}. "
                "Remove window_rows or set shuffle: window."
            )
        return self

    @property
    def columns(self) -> list[str]:
        """Every column that is read: features, label and weight, in this order."""
        extra = [self.label] if self.weight is None else [self.label, self.weight]
        return [feature.name for feature in self.features] + extra


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
    stall_after_s: float = Field(
        300.0,
        description="A gang that reports nothing for so many seconds counts as failed.",
        gt=0,
    )
    max_failures: int = Field(
        3, description="Failures in one run that are answered by a new gang.", ge=0
    )


class CheckpointConfig(Section):
    """When training state is written, and how much of it is kept."""

    every_steps: int = Field(
        0, description="Steps between checkpoints inside an epoch. 0: at epoch ends only.", ge=0
    )
    keep: PositiveInt = Field(3, description="Newest checkpoints that are kept.")


class ExportConfig(Section):
    """What the artifact holds."""

    h5: bool = Field(True, description="Write trained_model.h5 beside model.keras.")
    saved_model: bool = Field(
        True, description="Write saved_model/, which takes raw columns by name."
    )


class Job(Section):
    """One training job: model, data, training, and the processes to run it on."""

    name: str = Field(
        description="Names the run folder and the model: letters, digits, '_', '-' and '.'.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
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
        return self

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
