"""Batch services for tests: a model without TensorFlow, real processes, real tables."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.pool import Ended
from data_pipeline.naming import unlabelled_layout
from registry.database import Database
from registry.store import Registry
from serving.accounts import Account, Accounts, Quotas
from serving.batch_process import ProcessConfig, make_batches, worker_options
from serving.batch_worker import BatchWorker
from serving.errors import InputError
from serving.signature import Signature
from tests.support.artifacts import write_artifact

ROOT = Path(__file__).parents[2]
LOADER = "tests.support.batches:load_fake"
BATCH_ROWS = 64
POISON = 666.0


class FakeModel:
    """Gives a + 2 b; refuses calls with a row that holds POISON; takes some time for each call."""

    row_failures: tuple[type[Exception], ...] = ()

    def __init__(self, settings: dict[str, Any]) -> None:
        columns = [(name, ()) for name in ("a", "b")]
        if settings.get("vector"):
            columns.append(("v", (3,)))
        self.signature = Signature(unlabelled_layout(columns), (settings.get("outputs", 1),), None)
        self.batch_rows = (1, 8, BATCH_ROWS)
        self._call_s = settings.get("call_s", 0.0)
        self.calls: list[int] = []

    def predict(self, columns: Any) -> np.ndarray:
        a, b = columns["a"], columns["b"]
        self.calls.append(len(a))
        if (a == POISON).any():
            raise InputError("column 'a' has a value that the model refuses.", "a")
        if self._call_s:
            time.sleep(self._call_s)
        first = a + 2 * b
        if "v" in self.signature.inputs:
            first = first + columns["v"].sum(1)
        outputs = self.signature.output_shape[0]
        return np.stack([first + n for n in range(outputs)], 1).astype(np.float32)


def load_fake(artifact: str) -> FakeModel:
    return FakeModel(json.loads(Path(artifact, "settings.json").read_text()))


def rows(count: int, seed: int = 1) -> pa.Table:
    generator = np.random.default_rng(seed)
    return pa.table(
        {
            "id": pa.array([f"k{n}" for n in range(count)]),
            "a": generator.normal(size=count).astype(np.float32),
            "b": generator.normal(size=count).astype(np.float32),
        }
    )


def expected(table: pa.Table) -> np.ndarray:
    return table["a"].to_numpy() + 2 * table["b"].to_numpy()


class InlinePool:
    """Stations that work when they are polled, in this process; `lose` has tasks lost."""

    def __init__(self, options: dict[str, Any], lose: Callable[[Any], bool] = lambda _: False):
        self._options, self.lose = options, lose
        self._workers: dict[int, BatchWorker] = {}
        self._tasks: dict[int, Any] = {}
        self._next = 0
        self.given: list[Any] = []
        self.most = 0

    def resize(self, stations: int) -> None:
        while len(self._workers) < stations:
            self._workers[self._next] = BatchWorker(**self._options)
            self._next += 1
        for number in self.idle()[: max(0, len(self._workers) - stations)]:
            self._workers.pop(number)
        self.most = max(self.most, len(self._workers))

    def idle(self) -> list[int]:
        return [number for number in self._workers if number not in self._tasks]

    def give(self, station: int, task: Any) -> None:
        self.given.append(task)
        self._tasks[station] = json.loads(json.dumps(task))  # as if it had crossed a pipe

    def poll(self, timeout_s: float) -> list[Ended]:
        ended = []
        for station, task in list(self._tasks.items()):
            del self._tasks[station]
            if self.lose(task):
                del self._workers[station]
                ended.append(Ended(station, failure="lost", is_lost=True))
            else:
                ended.append(Ended(station, self._workers[station].run(task)))
        return ended

    def kill(self, station: int) -> None:
        self._workers.pop(station, None)

    def close(self) -> None:
        self._workers.clear()
        self._tasks.clear()


class Place:
    """A service in a folder: database, registry with the model `fake`, users and data.

    Attributes:
        account: A user who may read below `data`.
        config: What the service is started with.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any] | None = None,
        url: str | None = None,
        runner: dict[str, Any] | None = None,
        quotas: Quotas | None = None,
        inline: bool = True,
    ) -> None:
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir(parents=True)
        url = url or f"sqlite:///{folder}/lockstep.db"
        self.database = Database(url)
        self.registry = Registry(self.database, str(folder / "artifacts"))
        text = json.dumps(settings or {}).encode()
        artifact = write_artifact(folder / "artifact", {"settings.json": text})
        version = self.registry.register("fake", artifact)
        self.registry.set_alias("fake", "champion", version.number, who="test", why="test")
        self.accounts = Accounts(self.database)
        self.keys = {"ada": self.accounts.add("ada", who="test", quotas=quotas)}
        self.accounts.allow_input("ada", str(self.data), who="test")
        self.account: Account = self.accounts.account("ada")
        self.config = ProcessConfig(
            database=url,
            artifacts=str(folder / "artifacts"),
            service={"folder": str(folder / "service"), "outputs": [str(folder / "out/{user}")]},
            runner={"max_predictors": 2, "lease_s": 5.0, "refresh_s": 0.05, **(runner or {})},
            loader=LOADER,
            log_file=str(folder / "predictors.log"),
        )
        self.pool = InlinePool(worker_options(self.config))
        self.service, self.runner = make_batches(
            self.config, (lambda: self.pool) if inline else None
        )

    def user(self, name: str, **options: Any) -> Account:
        self.keys[name] = self.accounts.add(name, who="test", **options)
        return self.accounts.account(name)

    def write(self, table: pa.Table, name: str = "in.parquet", **options: Any) -> str:
        path = self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **options)
        return str(path)

    def submit(self, account: Account | None = None, **values: Any) -> str:
        values = {"model": "fake", **values}
        job, _ = self.service.submit(account or self.account, values)
        return job.id

    def until(self, name: str, *statuses: str, timeout_s: float = 30.0) -> Any:
        """Run the loop until a job is in one of some states (by default, ended)."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.service.job(self.account, name)
            if job.status in statuses or (not statuses and not job.is_active):
                return job
            assert time.monotonic() < deadline, f"{job.status}: {job}"
            if self.runner.snapshot()["is_owner"] or self.runner.begin():
                self.runner.step(0.05)

    def wait(self, name: str, timeout_s: float = 60.0) -> Any:
        """Wait until another process has ended a job."""
        deadline = time.monotonic() + timeout_s
        while (job := self.service.job(self.account, name)).is_active:
            assert time.monotonic() < deadline, job
            time.sleep(0.02)
        return job

    def close(self) -> None:
        self.runner.abandon()
        self.service._store.close()
        self.database.close()


class Dispatching:
    """The loop as a process of its own, to be killed."""

    def __init__(self, config: ProcessConfig) -> None:
        self._config = json.dumps(vars(config))
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "serving.batch_process", self._config],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "LOCKSTEP_LOG": "WARNING"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in found.split()]

    def restart(self) -> None:
        """SIGKILL, and another in its place."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def output(job: Any) -> pa.Table:
    """All parts of a job that the manifest names, in order."""
    manifest = json.loads(Path(job.folder, "manifest.json").read_text())
    return pa.concat_tables(
        [pq.read_table(Path(job.folder, part["name"])) for part in manifest["parts"]]
    )


def hashes(job: Any) -> dict[str, str]:
    manifest = json.loads(Path(job.folder, "manifest.json").read_text())
    return {entry["name"]: entry["sha256"] for entry in manifest["parts"] + manifest["errors"]}
