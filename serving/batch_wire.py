"""What requests for batch jobs may say, and what is answered: names and types of the wire."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.stores import is_remote
from serving.batch_tables import Job, StoredFile
from serving.errors import BatchError

DAY_S = 86_400


class BatchRequest(BaseModel):
    """What `POST /v1/batches` takes.

    Attributes:
        model: `name`, `name@alias` or `name/3`; resolved to a version now, whatever moves later.
        input: A file that was uploaded (`file-...`), or paths and URIs of Parquet, CSV or NDJSON.
        output: Folder or URI that receives the output. None: the service keeps it.
        output_format: `parquet`, or `input` for the input's own.
        keep: `keys` for the columns that the model does not take, `all`, or names.
        column: Name of the column of predictions.
        on_error: What a bad row does: `quarantine` leaves it to the error files, `null_fill` gives
            it a null in the output too, `fail_fast` fails the job.
        max_error_rate: Share of bad rows, from 0 to 1, above which the job fails.
        priority: Among the own jobs, from -100 to 100; higher goes first.
        window_s: Seconds after which the job is given up, 60 to 30 days.
        output_expires_after_s: Seconds after its end that the service keeps the output. None: until
            it is deleted.
        shard_rows: Rows of a shard. None: about two seconds' worth.
        metadata: Up to 16 texts of the user's, by names of up to 64 letters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, max_length=300)
    input: str | list[str]
    output: str | None = None
    output_format: Literal["parquet", "input"] = "parquet"
    keep: Literal["keys", "all"] | list[str] = "keys"
    column: str = Field("prediction", min_length=1, max_length=200)
    on_error: Literal["quarantine", "null_fill", "fail_fast"] = "quarantine"
    max_error_rate: float = Field(1.0, ge=0.0, le=1.0)
    priority: int = Field(0, ge=-100, le=100)
    window_s: int = Field(DAY_S, ge=60, le=30 * DAY_S)
    output_expires_after_s: int | None = Field(None, ge=60, le=365 * DAY_S)
    shard_rows: int | None = Field(None, ge=1, le=2**22)
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)


def read_request(values: dict[str, Any]) -> BatchRequest:
    """A checked request.

    Raises:
        BatchError: It has unknown fields, or values that are not allowed; the first one is named.
    """
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BatchError(
            "the request has half of a surrogate pair in a text; Unicode is allowed. Correct it.",
            "invalid_request",
        ) from None
    try:
        request = BatchRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "request"
        raise BatchError(
            f"{field}: {first['msg']}. Correct the field.", "invalid_request", column=field
        ) from None
    for name, value in request.metadata.items():
        if len(name) > 64 or len(value) > 512:
            raise BatchError(
                "metadata has names of more than 64 or values of more than 512 letters.",
                "invalid_request",
                column="metadata",
            )
    return request


def describe_job(job: Job) -> dict[str, Any]:
    """A job as `/v1/batches` tells it: a superset of OpenAI's batch object."""
    request = json.loads(job.request)
    plan = json.loads(job.plan or "{}")
    problems = json.loads(job.problems)
    good = job.row_done - job.row_bad
    input_names = request["input"]
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": request["plan"].get("url") or "/v1/batches",
        "model": {"name": job.model, "version": job.version, "digest": job.digest},
        "input": input_names,
        "input_file_id": input_names if isinstance(input_names, str) else input_names[0],
        "completion_window": _window(request["window_s"]),
        "status": job.status,
        "errors": {"object": "list", "data": problems} if problems else None,
        "output": job.folder if is_remote(job.folder) or request["output"] else None,
        "output_file_id": job.output_file,
        "error_file_id": job.error_file,
        "created_at": int(job.created_at),
        "expires_at": int(job.expires_at),
        **{f"{state}_at": _whole(getattr(job, f"{state}_at")) for state in _STATES},
        "request_counts": {"total": job.row_total, "completed": good, "failed": job.row_bad},
        "progress": job.row_done / job.row_total if job.row_total else 0.0,
        "has_good_rows": good > 0,
        "position": job.position,
        "eta_s": job.eta_s,
        "shards": {"total": job.shard_total, "done": job.shard_done},
        "output_bytes": job.output_bytes,
        "compute_s": round(job.compute_s, 3),
        "output_format": plan.get("output_format"),
        "priority": job.priority,
        "metadata": request["metadata"] or None,
    }


_STATES = (
    *("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"),
)


def describe_file(file: StoredFile) -> dict[str, Any]:
    """A file as OpenAI's API tells it, and its hash."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at),
        "expires_at": _whole(file.expires_at),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "sha256": file.sha256 or None,
    }


def _window(seconds: int) -> str:
    return f"{seconds // 3600}h" if seconds % 3600 == 0 else f"{seconds}s"


def _whole(at: float | None) -> int | None:
    return None if at is None else int(at)
