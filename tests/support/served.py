"""`lockstep serve` as a process, with the model of TensorFlow Serving's documentation."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.database import Database
from registry.store import Registry
from serving.accounts import Accounts
from serving.haproxy import free_ports
from tests.support.artifacts import write_artifact

ROOT = Path(__file__).parents[2]
MODEL = "half_plus_two"
_START_S = 180
_END_S = 90


@dataclass
class Served:
    """A service that answers.

    Attributes:
        url: Where.
        key: Of the user `tester`.
        process: Of the command.
        folder: Its LOCKSTEP_HOME lies in it.
    """

    url: str
    key: str
    process: "subprocess.Popen[Any]"
    folder: Path

    def database(self) -> Database:
        """The service's; to be closed."""
        return Database(database_url(self.folder))


def database_url(folder: Path) -> str:
    """Of a service in a folder."""
    return f"sqlite:///{folder / 'home' / 'service.db'}"


def divided(folder: Path, divisor: float = 2.0, name: str = "artifact") -> Path:
    """An artifact of x / divisor + 2; half plus two by default."""
    import tensorflow as tf

    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def serve(x: Any) -> Any:
        return {"y": x / divisor + 2}

    module.serve = serve
    saved = folder / f"saved-{name}"
    tf.saved_model.save(module, str(saved), signatures=serve)
    files = {
        f"saved_model/{path.relative_to(saved)}": path.read_bytes()
        for path in saved.rglob("*")
        if path.is_file()
    }
    signature = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": [None]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [None]}],
        "label": {"name": "y", "dtype": "float32", "shape": [None]},
        "weight": None,
    }
    files["signature.json"] = json.dumps(signature).encode()
    return write_artifact(folder / name, files)


def prepare(folder: Path) -> str:
    """The model as champion and the user `tester`, in a new home; returns the key."""
    database = Database(database_url(folder))
    registry = Registry(database, str(folder / "home" / "artifacts"))
    version = registry.register(MODEL, divided(folder))
    registry.set_alias(MODEL, "champion", version.number, who="test", why="test")
    key = Accounts(database).add("tester", who="test")
    database.close()
    return key


@contextmanager
def served(folder: Path, key: str, *options: str) -> Iterator[Served]:
    """The service, ended by SIGTERM with the block; its status must be 0."""
    (port,) = free_ports(1)
    home = str(folder / "home")
    environment = {**os.environ, "LOCKSTEP_HOME": home, "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-m", "lockstep.cli", "serve", "--port", str(port)]
    command += ["--database", database_url(folder), *options]
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        try:
            url = _url_of(process, log)
            yield Served(url, key, process, folder)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(_END_S) == 0, log.read_text()[-3000:]
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _url_of(process: "subprocess.Popen[Any]", log: Path) -> str:
    for _ in range(_START_S * 5):
        said = log.read_text()
        if "a key: " in said:
            return said.partition("serving at ")[2].split()[0]
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the service did not start:\n{log.read_text()[-3000:]}")
