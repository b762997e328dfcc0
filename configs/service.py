"""What the prediction service is: addresses, bounds and processes, typed.

Owns the meaning, the units and the defaults of every field, and the wording of mistakes in them.
A file with some of the fields, options of the command, and defaults make the whole, the option
before the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from configs.errors import UserError, did_you_mean
from configs.section import PositiveInt, Section

Bytes = Annotated[int, Field(ge=2**20)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServiceConfig(Section):
    """All settings of `lockstep serve`."""

    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0: all of them.")
    port: int = Field(8000, description="Port to listen on.", ge=1, le=65_535)
    tls_cert: str | None = Field(
        None, description="PEM file with the certificate and its chain. null: no TLS here."
    )
    tls_key: str | None = Field(None, description="PEM file with the certificate's private key.")
    database: str | None = Field(
        None,
        description="URL of the database. null: LOCKSTEP_DATABASE, else a file below "
        "LOCKSTEP_HOME.",
    )
    artifacts: str | None = Field(
        None,
        description="Folder or URI of registered artifacts. null: LOCKSTEP_ARTIFACTS, else a "
        "folder below LOCKSTEP_HOME.",
    )
    folder: str | None = Field(
        None,
        description="Folder for logs, numbers, uploads and outputs. null: `service` below "
        "LOCKSTEP_HOME.",
    )
    replicas: PositiveInt = Field(1, description="Processes that answer online requests, at least.")
    max_replicas: PositiveInt | None = Field(
        None, description="Most of these processes; more start under load. null: `replicas`."
    )
    predictors: int | None = Field(
        None,
        description="Most processes that compute batch jobs, started as there is work. null: one a "
        "CPU. 0: no batch jobs.",
        ge=0,
    )
    preload: tuple[str, ...] = Field(
        (), description="Models whose champion is loaded at the start; others at first use."
    )
    model_memory_bytes: Bytes = Field(
        2 * 2**30,
        description="Memory of each process for models, as estimated from their files. The least "
        "recently used leave when it is full.",
    )
    queue_rows: PositiveInt = Field(
        16_384, description="Most rows that wait for one model version; beyond, requests get 429."
    )
    batch_rows: PositiveInt = Field(
        4_096, description="Requests join a batch while it holds fewer rows."
    )
    poll_s: Seconds = Field(1.0, description="Time between two looks for moved aliases.")
    timeout_s: Seconds = Field(
        30.0, description="Time for an answer, where a request does not say. Beyond: 504."
    )
    max_timeout_s: Seconds = Field(300.0, description="The longest time a request may ask for.")
    drain_s: Seconds = Field(
        30.0, description="The longest time for requests under way when the service ends."
    )
    max_body_bytes: Bytes = Field(64 * 2**20, description="Largest body, as sent. Beyond: 413.")
    max_upload_bytes: Bytes = Field(2 * 2**30, description="Largest upload of a file.")
    max_inflated_bytes: Bytes = Field(
        256 * 2**20, description="Largest body after gzip or deflate. Beyond: 413."
    )
    max_rows: PositiveInt = Field(1_000_000, description="Most rows in one request.")
    outputs: tuple[str, ...] = Field(
        (),
        description="Folders and URIs below which users may have outputs of batch jobs, {user} "
        "standing for the user's name. Outputs in the service's folder are always there.",
    )
    is_metrics_public: bool = Field(
        False, description="Whether /metrics answers without an admin's key."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                "tls_cert and tls_key belong together; received one of them. Give both, or none."
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is below replicas={self.replicas}. Raise it, or "
                "leave it out."
            )
        if self.timeout_s > self.max_timeout_s:
            raise ValueError(
                f"timeout_s={self.timeout_s:g} is above max_timeout_s={self.max_timeout_s:g}. "
                "Lower it."
            )
        return self


def load_service(file: str | Path | None, options: Mapping[str, Any]) -> ServiceConfig:
    """Settings from a YAML file (None: no file) and options, which go first.

    Raises:
        UserError: The file cannot be read, a field is unknown, or a value is not allowed.
    """
    values = {} if file is None else _read(Path(file))
    values |= {name: value for name, value in options.items() if value is not None}
    try:
        config = ServiceConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_sentence(details) for details in error.errors())) from None
    for name in ("tls_cert", "tls_key"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise UserError(f"{name}: there is no file {path}; a PEM file is needed.")
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {path} ({reason}). A YAML file is needed.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: received {type(values).__name__}; a mapping is allowed.")
    return values


def _sentence(details: Any) -> str:
    field = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        names = list(ServiceConfig.model_fields)
        return f"unknown field {field}; see docs/serving.md.{did_you_mean(field, names)}"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return str(message)
    return f"{field}: received {details['input']!r}; {message[0].lower()}{message[1:]}."
