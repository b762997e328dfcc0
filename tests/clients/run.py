"""Real clients against `lockstep serve`: Triton's, KServe's, OpenAI's, curl, and schemathesis.

Run as `python -m tests.clients.run`, by `make test-clients`. Makes two environments below `build/`
where they are missing, starts a service of its own with the model of TensorFlow Serving's
documentation (half of x, plus two), and ends with status 1 where a client finds something wrong.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.haproxy import free_ports

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build"
SCHEMATHESIS = "schemathesis==4.32.5"
START_S = 180
CHECKS = (
    *("not_a_server_error", "ignored_auth", "status_code_conformance", "unsupported_method"),
    *("content_type_conformance", "response_schema_conformance", "response_headers_conformance"),
)

# The lines of TensorFlow Serving's documentation, and the answers that it shows.
CURLS: tuple[tuple[list[str], Any], ...] = (
    (
        [*("-d", '{"instances": [1.0, 2.0, 5.0]}'), *("-X", "POST"), "half_plus_two:predict"],
        {"predictions": [2.5, 3.0, 4.5]},
    ),
    (
        ["-d", '{"inputs": [1.0, 2.0, 5.0]}', "-X", "POST", "half_plus_two/versions/1:predict"],
        {"outputs": [2.5, 3.0, 4.5]},
    ),
    (
        [
            *("-d", '{"signature_name": "serving_default", "instances": [{"x": 1.0}]}'),
            "half_plus_two/labels/champion:predict",
        ],
        {"predictions": [2.5]},
    ),
    (
        ["half_plus_two"],
        {
            "model_version_status": [
                {
                    "version": "1",
                    "state": "AVAILABLE",
                    "status": {"error_code": "OK", "error_message": ""},
                }
            ]
        },
    ),
    (
        ["half_plus_two/metadata"],
        {"model_spec": {"name": "half_plus_two", "signature_name": "", "version": "1"}},
    ),
)


def environment(name: str, packages: list[str]) -> Path:
    """The programs' folder of an environment with some packages; made once."""
    folder = BUILD / name
    mark = folder / ".ready"
    if not mark.exists() or mark.read_text() != "\n".join(packages):
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=not folder.exists())
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *packages], check=True)
        mark.write_text("\n".join(packages))
    return folder / "bin"


def half_plus_two(folder: Path) -> Path:
    """The model of the documentation, as an artifact."""
    import tensorflow as tf

    from tests.support.artifacts import write_artifact

    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def serve(x: Any) -> Any:
        return {"y": x / 2 + 2}

    module.serve = serve
    tf.saved_model.save(module, str(folder / "saved"), signatures=serve)
    files = {
        f"saved_model/{path.relative_to(folder / 'saved')}": path.read_bytes()
        for path in (folder / "saved").rglob("*")
        if path.is_file()
    }
    signature = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": [None]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [None]}],
        "label": {"name": "y", "dtype": "float32", "shape": [None]},
        "weight": None,
    }
    files["signature.json"] = json.dumps(signature).encode()
    return write_artifact(folder / "artifact", files)


@contextmanager
def service(folder: Path) -> Iterator[tuple[str, str]]:
    """A service with the model; yields its URL and a key."""
    from registry.database import Database
    from registry.store import Registry
    from serving.accounts import Accounts

    home = folder / "home"
    os.environ |= {"LOCKSTEP_HOME": str(home), "CUDA_VISIBLE_DEVICES": "-1"}
    database = Database()
    registry = Registry(database)
    version = registry.register("half_plus_two", half_plus_two(folder))
    registry.set_alias("half_plus_two", "champion", version.number, who="test", why="test")
    key = Accounts(database).add("tester", who="test")
    database.close()
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "lockstep.cli", "serve", "--port", str(port)]
    with open(folder / "serve.log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            wait_for(process, folder / "serve.log")
            yield f"http://127.0.0.1:{port}", key
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(90)
                print(f"the service ended with status {status}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


def wait_for(process: "subprocess.Popen[Any]", log: Path) -> None:
    """Return when the service says that it answers."""
    for _ in range(START_S * 5):
        if "a key: " in log.read_text():
            return
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    raise SystemExit(f"the service did not start:\n{log.read_text()[-3000:]}")


def curl(url: str, key: str) -> int:
    """The documentation's lines; returns how many were answered otherwise."""
    wrong = 0
    for arguments, expected in CURLS:
        *options, path = arguments
        command = ["curl", "-s", *options, "-H", f"Authorization: Bearer {key}"]
        done = subprocess.run(
            [*command, f"{url}/v1/models/{path}"], capture_output=True, text=True, timeout=60
        )
        answer = json.loads(done.stdout)
        is_right = {name: answer.get(name) for name in expected} == expected
        wrong += not is_right
        print(f"{'ok ' if is_right else 'WRONG'} curl {path} {'' if is_right else answer}")
    return wrong


def schemathesis(program: Path, url: str, key: str, folder: Path) -> int:
    """Two runs over the OpenAPI: with names of any kind, and with those that lead somewhere."""
    wrong = 0
    for config in (None, HERE / "schemathesis.toml"):
        options = [] if config is None else ["--config-file", str(config)]
        command = [
            *(str(program / "schemathesis"), *options, "run", f"{url}/openapi.json"),
            *("--header", f"Authorization: Bearer {key}", "--checks", ",".join(CHECKS)),
            *("--max-examples", "20", "--seed", "7", "--workers", "2", "--no-color"),
            *("--request-timeout", "60", "--suppress-health-check", "all"),
        ]
        done = subprocess.run(command, cwd=folder, timeout=1_800)
        wrong += done.returncode != 0
    return wrong


def main() -> int:
    """All of it; the status is the number of parts that found something wrong."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    clients = environment("clients", [line for line in lines if not line.startswith("#")])
    fuzzer = environment("schemathesis", [SCHEMATHESIS])
    with tempfile.TemporaryDirectory(prefix="lockstep-clients-") as name:
        folder = Path(name)
        with service(folder) as (url, key):
            wrong = curl(url, key)
            command = [str(clients / "python"), str(HERE / "calls.py"), url]
            secret: Mapping[str, str] = {**os.environ, "LOCKSTEP_API_KEY": key, "PYTHONPATH": ""}
            wrong += subprocess.run(command, env=dict(secret), timeout=600).returncode != 0
            if "--no-schemathesis" not in sys.argv:
                wrong += schemathesis(fuzzer, url, key, folder)
    print("all clients are content" if not wrong else f"{wrong} parts found something wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
