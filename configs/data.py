"""The section `data` of a job: where rows are, which columns count, how they are ordered.

Owns what the settings of a column mean and which of them go together. What the files hold is
checked by `data_pipeline`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from configs.section import LayerSpec, Paths, PositiveInt, Section

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
