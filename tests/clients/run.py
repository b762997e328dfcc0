"""Real clients against `lockstep serve`: Triton's, KServe's, OpenAI's, curl, and schemathesis.

Run as `python -m tests.clients.run`, by `make test-clients`. Makes two environments below `build/`
where they are missing, starts a service of its own with the model of TensorFlow Serving's
documentation (half of x, plus two), and ends with status 1 where a client finds something wrong.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.served import prepare, served

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build"
SCHEMATHESIS = "schemathesis==4.32.5"
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
        venv.create(folder, with_pip=True, clear=True, symlinks=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *packages], check=True)
        mark.write_text("\n".join(packages))
    return folder / "bin"


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
    """Two runs over the OpenAPI: with names of any kind, and with those that lead somewhere.

    One worker: it parses source while it generates, and Python 3.11 counts the depth of that for
    all threads together ("AST constructor recursion depth mismatch").
    """
    wrong = 0
    for config in (None, HERE / "schemathesis.toml"):
        options = [] if config is None else ["--config-file", str(config)]
        command = [
            *(str(program / "schemathesis"), *options, "run", f"{url}/openapi.json"),
            *("--header", f"Authorization: Bearer {key}", "--checks", ",".join(CHECKS)),
            *("--max-examples", "20", "--seed", "7", "--workers", "1", "--no-color"),
            *("--request-timeout", "60", "--suppress-health-check", "all", "--max-time", "300"),
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
        with served(folder, prepare(folder)) as service:
            url, key = service.url, service.key
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
