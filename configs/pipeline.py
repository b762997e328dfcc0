"""What a pipeline is: the schema of the files that `lockstep retrain` and `lockstep schedule` read.

Owns which rows are new, which ones judge, what a candidate has to hold against the champion, and
who is told. A pipeline trains by a job; what of the job's data it replaces stands here, too.
"""

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from configs.schedule import ScheduleConfig
from configs.schema import Job
from configs.section import Paths, PositiveInt, Section

Finite = Annotated[float, Field(allow_inf_nan=False)]

MAX_SLICES = 1_000
"""The most values that a column of `gate.slices` may have."""


class FrozenRowsConfig(Section):
    """The rows that judge: exactly one of `files`, `newest_files`, `newest_days` and `fraction`.

    A run copies them before it trains; champion and candidate see this copy.
    """

    files: Paths | None = Field(
        None, description="Files that are held out; they never train, wherever else they are named."
    )
    newest_files: PositiveInt | None = Field(
        None, description="So many files of data.files, the last ones by name, judge."
    )
    newest_days: float | None = Field(
        None,
        description="The rows of the last so many days judge, by data.time_column, counted from "
        "the newest row.",
        gt=0,
        allow_inf_nan=False,
    )
    fraction: float | None = Field(
        None,
        description="About this part of all rows judges, chosen by a hash of `key`: a row that "
        "judges once does so in every later run, and never trains.",
        gt=0,
        lt=1,
    )
    key: list[str] | None = Field(
        None,
        description="Columns whose values choose the rows of `fraction`; rows that agree in them, "
        "such as those of one customer, stay together. null: all columns of the job.",
        min_length=1,
    )
    max_rows: PositiveInt = Field(
        200_000,
        description="The most rows that judge; of more, so many are drawn by chance, always the "
        "same ones.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        names = ("files", "newest_files", "newest_days", "fraction")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"received {' and '.join(given) or 'none of them'}; exactly one of "
                f"{', '.join(names)} says which rows judge. Keep one of them."
            )
        if self.key is not None and self.fraction is None:
            raise ValueError("key has no effect without fraction. Remove key.")
        return self


class NewDataConfig(Section):
    """Which rows there are, which of them are new, which train, and which judge."""

    files: Paths | None = Field(
        None,
        description="A growing folder, a glob, or a list. null: data.train of the job.",
    )
    time_column: str | None = Field(
        None,
        description="Column with the time of a row: rows later than the newest one that the "
        "champion's run saw are new. null: files are new that were not there, or have changed.",
    )
    identity: Literal["time", "hash"] = Field(
        "time",
        description="What tells that a file has changed. time: size or time of change. hash: its "
        "bytes, which are read where size or time differ.",
    )
    train_on: Literal["all", "new"] = Field(
        "all",
        description="all: old and new rows train. new: new rows only, to go on from the champion "
        "with; the first run takes all.",
    )
    window_files: PositiveInt | None = Field(
        None, description="Only the last so many files, by name, train. null: all."
    )
    window_days: float | None = Field(
        None,
        description="Only rows of so many days before the newest one that trains do, by "
        "time_column. null: all.",
        gt=0,
        allow_inf_nan=False,
    )
    evaluation: FrozenRowsConfig = Field(description="The rows that judge.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.time_column is None:
            for name, value in (
                ("window_days", self.window_days),
                ("evaluation.newest_days", self.evaluation.newest_days),
            ):
                if value is not None:
                    raise ValueError(
                        f"{name}={value:g} counts days of a column, and time_column names none. "
                        "Set time_column."
                    )
        else:
            for name, given in (
                ("window_files", self.window_files),
                ("evaluation.newest_files", self.evaluation.newest_files),
            ):
                if given is not None:
                    raise ValueError(
                        f"{name}={given} counts files, but time_column tells old rows from new "
                        f"ones. Use {name.replace('files', 'days')}, or remove time_column."
                    )
            if self.identity != "time":
                raise ValueError(
                    f"identity: {self.identity} has no effect with time_column. Remove it."
                )
        judges_newest = self.evaluation.newest_files or self.evaluation.newest_days
        if self.train_on == "new" and judges_newest:
            raise ValueError(
                "train_on: new trains on the rows that evaluation takes away to judge. Let a "
                "fraction judge, or files that are held out, or set train_on: all."
            )
        if self.train_on == "new" and (self.window_files or self.window_days):
            raise ValueError(
                "a window has no effect with train_on: new, which takes no old rows. Remove one."
            )
        return self


class ThresholdConfig(Section):
    """A bound that a candidate's metric must keep."""

    metric: str = Field(description="`loss`, or a metric of the job by its name.", min_length=1)
    min: Finite | None = Field(None, description="The least value that passes. null: none.")
    max: Finite | None = Field(None, description="The greatest value that passes. null: none.")

    @model_validator(mode="after")
    def _has_bound(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError(f"{self.metric} has no bound. Set min or max.")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min:g} is above max={self.max:g}: nothing passes.")
        return self


class NoWorseConfig(Section):
    """How much worse than the champion a candidate may be, and how sure that has to be."""

    metric: str = Field(
        "loss", description="`loss`, or a metric of the job by its name.", min_length=1
    )
    by: float = Field(
        description="How much worse is allowed. 0: not at all. Below 0: it has to be better by as "
        "much.",
        allow_inf_nan=False,
    )
    scale: Literal["absolute", "relative"] = Field(
        "relative",
        description="absolute: `by` is in units of the metric. relative: in parts of the "
        "champion's value, 0.01 is one per cent.",
    )
    mode: Literal["auto", "min", "max"] = Field(
        "auto",
        description="Whether less (min) or more (max) of the metric is better. auto: as its name "
        "says, which is refused where the job computes it by another kind's name.",
    )
    confidence: float | None = Field(
        0.95,
        description="The candidate passes where it is no worse than that with this confidence, by "
        "a paired bootstrap over the rows. null: the two values are compared as they are, which "
        "metrics that are no mean over rows, such as AUC, need.",
        gt=0.5,
        lt=1,
    )


class SliceConfig(Section):
    """The same checks for each value of a column."""

    column: str = Field(description="A column of the data; it need not be a feature.")
    min_rows: PositiveInt = Field(
        100, description="Values with fewer rows are not judged; the report names them."
    )
    thresholds: list[ThresholdConfig] = Field(
        default_factory=list, description="Bounds that hold in each slice."
    )
    no_worse_than_champion: list[NoWorseConfig] = Field(
        default_factory=list, description="Comparisons that hold in each slice."
    )

    @model_validator(mode="after")
    def _has_checks(self) -> Self:
        if not self.thresholds and not self.no_worse_than_champion:
            raise ValueError(
                f"slices of {self.column!r} check nothing. Give thresholds or "
                "no_worse_than_champion."
            )
        return self


class LatencyConfig(Section):
    """How long a prediction of the exported artifact may take, in a process of its own."""

    one_row_ms: float | None = Field(
        None, description="Median for one row, in ms. null: no bound.", gt=0
    )
    thousand_rows_ms: float | None = Field(
        None, description="Median for 1,000 rows together, in ms. null: no bound.", gt=0
    )

    @model_validator(mode="after")
    def _has_bound(self) -> Self:
        if self.one_row_ms is None and self.thousand_rows_ms is None:
            raise ValueError("latency has no bound. Set one_row_ms or thousand_rows_ms.")
        return self


class SmokeConfig(Section):
    """Whether the exported artifact, loaded in a new process, is the model that was trained."""

    rows: PositiveInt = Field(
        1_000, description="Rows on which all formats of the artifact have to predict the same."
    )
    tolerance: float = Field(
        1e-3,
        description="How far predictions may differ between formats, and metrics from those of "
        "the training's own evaluation, in parts of the value.",
        gt=0,
        lt=1,
    )


class GateConfig(Section):
    """What a candidate has to pass before users are served by it."""

    thresholds: list[ThresholdConfig] = Field(
        default_factory=list, description="Bounds on metrics over all rows that judge."
    )
    no_worse_than_champion: list[NoWorseConfig] = Field(
        default_factory=list,
        description="Comparisons with the champion; without effect while there is none.",
    )
    slices: list[SliceConfig] = Field(
        default_factory=list, description="Checks for each value of a column."
    )
    latency: LatencyConfig | None = Field(None, description="null: not measured against a bound.")
    max_size_mb: float | None = Field(
        None, description="Greatest size of the artifact, in MB (10^6 bytes). null: any.", gt=0
    )
    smoke: SmokeConfig = Field(
        default_factory=SmokeConfig, description="The trial of the artifact."
    )
    resamples: PositiveInt = Field(
        1_000, description="Resamples of each bootstrap.", ge=100, le=100_000
    )

    @property
    def metrics(self) -> list[str]:
        """Every metric that is named, once."""
        thresholds = [*self.thresholds, *(each for part in self.slices for each in part.thresholds)]
        names = [each.metric for each in thresholds] + [each.metric for each in self.comparisons]
        return list(dict.fromkeys(names))

    @property
    def comparisons(self) -> list[NoWorseConfig]:
        """Every comparison with the champion, those of slices last."""
        of_slices = (each for part in self.slices for each in part.no_worse_than_champion)
        return [*self.no_worse_than_champion, *of_slices]


class WebhookConfig(Section):
    """An address that a JSON object is posted to. Secrets are named, never written."""

    url: str | None = Field(None, description="http:// or https://, without user and password.")
    url_from: str | None = Field(
        None,
        description="Name of the environment variable that holds the URL, for one that is secret.",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    headers_from: dict[str, str] = Field(
        default_factory=dict,
        description="Headers by name, each with the environment variable that holds its value, "
        "such as {Authorization: HOOK_TOKEN}.",
    )
    timeout_s: float = Field(10.0, description="Longest wait of one attempt.", gt=0, le=60)
    attempts: PositiveInt = Field(
        3, description="Attempts, with waits of 1, 2, 4 ... seconds between them.", le=6
    )

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        if (self.url is None) == (self.url_from is None):
            raise ValueError("exactly one of url and url_from is allowed. Keep one of them.")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"received a URL that begins with {self.url[:8]!r}; http:// or https:// with a "
                    "host is allowed."
                )
            if parts.username is not None or parts.password is not None:
                raise ValueError(
                    "the URL holds a user or a password; secrets come from the environment. Use "
                    "url_from or headers_from."
                )
        return self


def _job_or_path(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(
            f"received the path {value!r}; a path is resolved by configs.load.load_pipeline alone. "
            "Load the pipeline by it."
        )
    return value


class Pipeline(Section):
    """One pipeline: from new data to a champion, or to a reason why not."""

    name: str = Field(
        description="Names the pipeline and its run folders: letters, digits, '_', '-' and '.'.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
    )
    job: Annotated[Job, BeforeValidator(_job_or_path, json_schema_input_type=str | Job)] = Field(
        description="The training job: a path from the working directory, or the job itself. The "
        "pipeline sets its data.train and data.test.",
    )
    model: str | None = Field(
        None,
        description="The model's name in the registry. null: the job's name.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
    )
    data: NewDataConfig
    start_from: Literal["scratch", "champion"] = Field(
        "scratch",
        description="scratch: each candidate is trained anew. champion: training goes on from the "
        "champion's weights; the first one starts from scratch.",
    )
    gate: GateConfig = Field(default_factory=GateConfig)
    schedule: ScheduleConfig | None = Field(
        None, description="When `lockstep schedule run` runs it. null: never by itself."
    )
    on_success: WebhookConfig | None = Field(
        None, description="Told of each run that came to a decision. null: nobody."
    )
    on_failure: WebhookConfig | None = Field(
        None, description="Told of each run that failed. null: nobody."
    )
    lease_s: float = Field(
        60.0,
        description="Seconds without a sign of life after which a run counts as dead, and another "
        "may go on with it.",
        ge=3,
        le=3600,
    )
    runs_dir: str = Field("runs", description="Folder that holds pipelines/<name>/<run_id>/.")

    @property
    def model_name(self) -> str:
        """The model's name in the registry."""
        return self.model or self.job.name

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.data.train_on == "new" and self.start_from == "scratch":
            raise ValueError(
                "data.train_on: new with start_from: scratch forgets all old rows. Set start_from: "
                "champion, or data.train_on: all with a window."
            )
        if self.job.data.format == "images" or self.job.data.images is not None:
            raise ValueError(
                "job.data holds folders of images; a pipeline takes files with rows. Convert them "
                "to Parquet first."
            )
        return self
