"""What the prediction service is: addresses, bounds and processes, typed.

Owns the meaning, the units and the defaults of every field. `configs.load` reads the file.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

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
        description="Most processes that compute batch jobs, started as there is work. null: as "
        "many as there are CPUs, or GPUs for `predictor_gpus`. 0: no batch jobs.",
        ge=0,
    )
    predictor_pool: Literal["processes", "actors"] = Field(
        "processes",
        description="What these are: processes of the machine that dispatches, or actors on any "
        "machine of the Ray cluster that the service runs on, with a CPU each.",
    )
    predictor_gpus: float = Field(
        0.0, description="GPUs of each of them, also fractions; for actors.", ge=0, le=16
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
    unready_s: float = Field(
        1.0,
        description="Time for which requests are still taken after SIGTERM, with 503 at /readyz, "
        "so that what balances the load looks elsewhere. 0: none.",
        ge=0,
        le=600,
    )
    max_body_bytes: Bytes = Field(64 * 2**20, description="Largest body, as sent. Beyond: 413.")
    max_upload_bytes: Bytes = Field(2 * 2**30, description="Largest upload of a file.")
    max_inflated_bytes: Bytes = Field(
        256 * 2**20, description="Largest body after gzip or deflate. Beyond: 413."
    )
    max_bodies_bytes: Bytes = Field(
        2**30,
        description="Memory of each process for the bodies of all requests under way, as sent and "
        "as inflated. Beyond: 429.",
    )
    max_user_bodies_bytes: Bytes = Field(
        2**29, description="The part of it that one user may hold. Beyond: 429."
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

    @field_validator("tls_cert", "tls_key")
    @classmethod
    def _check_file(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_file():
            raise ValueError(f"there is no file {path}; a PEM file is needed. Name one.")
        return path

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
        if self.predictor_gpus and self.predictor_pool != "actors":
            raise ValueError(
                f"predictor_gpus={self.predictor_gpus:g} has no effect on processes, which see all "
                "GPUs of their machine. Set predictor_pool to actors, or leave it out."
            )
        largest = self.max_body_bytes + self.max_inflated_bytes
        if not largest <= self.max_user_bodies_bytes <= self.max_bodies_bytes:
            raise ValueError(
                f"max_user_bodies_bytes={self.max_user_bodies_bytes} must hold one body as sent "
                f"and inflated (max_body_bytes + max_inflated_bytes = {largest}) and be at most "
                f"max_bodies_bytes={self.max_bodies_bytes}. Change one of them."
            )
        if self.timeout_s > self.max_timeout_s:
            raise ValueError(
                f"timeout_s={self.timeout_s:g} is above max_timeout_s={self.max_timeout_s:g}. "
                "Lower it."
            )
        return self
