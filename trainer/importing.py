"""Import of a model file, whoever made it, in a process that may be lost.

Owns that process: a clean environment without secrets, a limit of time, of memory and of what it
may write, and what its end means. The process itself is `trainer.import_worker`; nothing of the
file is opened here.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import EnvironmentFailure, UserError
from trainer.errors import ImportRefused

WORKER = "trainer.import_worker"
"""The module that imports, in the process."""

_MARK = "lockstep-import:"
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TZ")
_POLL_S = 0.05
_MAX_TIMEOUT_S = 604_800.0
_MIN_MEMORY_MB, _MAX_MEMORY_MB = 1_000, 100_000_000
_WRITTEN_FACTOR = 4  # of the memory, in a single file
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TAIL_CHARACTERS = 1500


class ImportFailure(EnvironmentFailure):
    """The process that imports ended without an answer, or went over a limit."""

    is_retryable = False


@dataclass(frozen=True)
class ImportRequest:
    """What is to be imported.

    Attributes:
        path: A `.keras` or `.h5` file, or a SavedModel or artifact folder.
        folder: Receives the artifact; must not exist, or be empty.
        features: The input columns in order; none for one column of lists named "features".
        label: The label's column; empty where it is not known.
        input_shape: Lengths of a row's axes, where the file does not tell them; empty otherwise.
        is_trusted: Allow code in the file to run.
        timeout_s: How long it may take.
        memory_mb: How much memory it may take, in units of 1,000,000 bytes.
    """

    path: str
    folder: str
    features: tuple[str, ...] = ()
    label: str = ""
    input_shape: tuple[int, ...] = ()
    is_trusted: bool = False
    timeout_s: float = 300.0
    memory_mb: int = 4000


@dataclass(frozen=True)
class Imported:
    """What became of a model file.

    Attributes:
        format: Such as "h5 of Keras 2.3.1 (theano)".
        warnings: What was changed, left out, or is not possible with it.
        can_train: Whether the artifact holds a Keras model; else it can only predict.
        lineage: What the artifact's manifest says of its origin.
    """

    format: str
    warnings: list[str]
    can_train: bool
    lineage: dict[str, Any]


def import_model(request: ImportRequest) -> Imported:
    """Turn a model file into an artifact folder, in a process of its own. Blocks.

    Raises:
        ImportRefused: The file is damaged, could run code, or has no equal in Keras 3.
        ImportFailure: The process crashed, or went over its limit of time or memory.
    """
    path = Path(request.path)
    if not path.exists():
        raise ImportRefused(
            f"there is no model at {path}; a .keras or .h5 file or a SavedModel folder is allowed. "
            "Check the path."
        )
    _check_limits(request)
    with tempfile.TemporaryDirectory(prefix="lockstep-import-", ignore_cleanup_errors=True) as room:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the caller's; it ends the process below
            # What it leaves in its temporary folder goes when it is ended, however that is.
            env={**_environment(os.environ), "TMPDIR": room},
        )
        try:
            _limit(process.pid, request)
            output, errors, fate = _watched(process, request)
        finally:
            _end(process)
    answer = _find_answer(output)
    if answer is None:
        raise ImportFailure(_explain(process.returncode, fate, errors, request))
    if "refused" in answer:
        raise ImportRefused(answer["refused"])
    return Imported(**answer)


def _check_limits(request: ImportRequest) -> None:
    if not 0 < request.timeout_s <= _MAX_TIMEOUT_S:  # not for NaN either
        raise UserError(
            f"--timeout-s received {request.timeout_s:g}; more than 0 and at most "
            f"{_MAX_TIMEOUT_S:g} s, a week, are allowed. Change it."
        )
    if not _MIN_MEMORY_MB <= request.memory_mb <= _MAX_MEMORY_MB:
        raise UserError(
            f"--memory-mb received {request.memory_mb}; {_MIN_MEMORY_MB} to {_MAX_MEMORY_MB} MB "
            "are allowed: TensorFlow alone takes several hundred. Change it."
        )


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a stranger's file may see of the environment: no addresses, no secrets."""
    kept = {name: environment[name] for name in _PASSED_ON if name in environment}
    return {
        **kept,
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONUNBUFFERED": "1",
    }


def _limit(pid: int, request: ImportRequest) -> None:
    """The kernel's limits: processor time, size of a written file, no core dump.

    Memory is limited by `RLIMIT_DATA`, which counts what is private and writable; the threads'
    stacks that TensorFlow reserves without using are why it may be more than the resident memory.
    """
    seconds = int(request.timeout_s * (os.cpu_count() or 1)) + 1
    size = request.memory_mb * 1_000_000
    limits = [
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, int(_WRITTEN_FACTOR * size)),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, 2 * size + 2_000_000_000),
    ]
    for kind, value in limits:
        _, hard = resource.getrlimit(kind)  # the child's own is the same
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)  # a limit that is there already is not raised
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pid, kind, (value, value))


def _watched(process: "subprocess.Popen[bytes]", request: ImportRequest) -> tuple[str, str, str]:
    """Output, errors, and the limit that ended the process, if one did: "time" or "memory"."""
    pending = json.dumps(asdict(request)).encode()
    deadline = time.monotonic() + request.timeout_s
    fate = ""
    given: bytes | None = pending
    while True:
        try:
            output, errors = process.communicate(given, timeout=_POLL_S)
            return output.decode(errors="replace"), errors.decode(errors="replace"), fate
        except subprocess.TimeoutExpired:
            given = None
        if not fate and _resident_bytes(process.pid) > request.memory_mb * 1_000_000:
            fate = "memory"
        elif not fate and time.monotonic() > deadline:
            fate = "time"
        if fate:
            _end(process)


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and what it started; idempotent."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _explain(status: int, fate: str, errors: str, request: ImportRequest) -> str:
    name = Path(request.path).name
    if fate == "time":
        return (
            f"importing {name} took more than {request.timeout_s:g} s and was ended. Raise "
            "--timeout-s if the model is that large."
        )
    if fate == "memory" or "MemoryError" in errors or "bad_alloc" in errors:
        return (
            f"importing {name} took more than {request.memory_mb} MB of memory and was ended. "
            "Raise --memory-mb if the model is that large."
        )
    how = f"status {status}"
    if status < 0:
        how = signal.Signals(-status).name
    tail = errors.strip()[-_TAIL_CHARACTERS:]
    return (
        f"the process that imports {name} ended with {how}: the file makes Keras or TensorFlow "
        f"crash, or is damaged. Nothing was imported.{chr(10) + tail if tail else ''}"
    )


def _find_answer(output: str) -> dict[str, Any] | None:
    for line in output.splitlines():
        if line.startswith(_MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return answer
    return None


def print_answer(answer: Mapping[str, Any]) -> None:
    """For the process that imports: hand the answer up."""
    print(_MARK + json.dumps(answer), flush=True)
