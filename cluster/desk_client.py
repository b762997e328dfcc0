"""The near side of the desk: a question becomes a short Ray job, its printed answer a value."""

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets as randomness
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from cluster.errors import DeskFailure
from cluster.jobs_api import JobsApi
from configs.errors import EnvironmentFailure, LockstepError, UserError

ANSWER = "lockstep-answer:"
REFUSAL = "lockstep-refusal:"
FILE = "lockstep-file:"
PART = "lockstep-part:"
END = "lockstep-end:"

_ASK_S = 120.0
_SILENCE_S = 120.0
_POLL_S = 0.25
_FINISH_S = 15.0


class Desk:
    """Asks questions of one cluster; each waits for its answer with a bound."""

    def __init__(self, api: JobsApi) -> None:
        self._api = api

    def ask(
        self,
        verb: str,
        question: Mapping[str, Any],
        folder: Path | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The answer to a question, asked in a copy of `folder` where one is given.

        Secrets travel beside the job: neither its command nor its record holds them.

        Raises:
            UserError: The cluster's side refused.
            DeskFailure: There was no answer.
        """
        name = self._start(verb, question, folder, secrets)
        deadline = time.monotonic() + _ASK_S
        while not (job := self._api.status(name)).is_final:
            if time.monotonic() > deadline:
                self._api.stop(name)
                raise DeskFailure(
                    f"{self._api.address} has not answered {verb!r} within {_ASK_S:g} s: the job "
                    f"{name} is {job.status}. See whether the head is overloaded."
                )
            time.sleep(_POLL_S)
        log = self._api.logs(name)
        for line in log.splitlines():
            if line.startswith(ANSWER):
                self._api.forget(name)
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
            if line.startswith(REFUSAL):
                self._api.forget(name)
                raise UserError(json.loads(line.removeprefix(REFUSAL)))
        raise DeskFailure(self._explain(name, log or job.message))

    def fetch(self, run_folder: str, output: Path | None) -> dict[str, Any]:
        """The summary of a run; its files go to `output`, which appears whole or not at all.

        Raises:
            UserError: `output` exists.
            DeskFailure: Files did not arrive whole.
        """
        if output is not None and output.exists():
            raise UserError(f"--output received {output}, which exists. Name a new folder.")
        question = {"run_folder": run_folder, "with_files": output is not None}
        if output is None:
            return self.ask("fetch", question)
        name = self._start("fetch", question, None, None)
        arriving = output.with_name(f"{output.name}.part-{randomness.token_hex(4)}")
        received = _Arrival(arriving)
        try:
            asyncio.run(self._receive(name, received))
            answer = received.answer
            if answer is None or not received.is_whole:
                raise DeskFailure(self._explain(name, self._api.logs(name)[-2000:]))
            if answer.get("summary") is not None:
                arriving.mkdir(parents=True, exist_ok=True)
                arriving.rename(output)
            return answer
        finally:
            received.close()
            shutil.rmtree(arriving, ignore_errors=True)
            self._finish(name)

    def _finish(self, name: str) -> None:
        """Tell a job that all has arrived, so that it empties its log, and forget it."""
        deadline = time.monotonic() + _FINISH_S
        with contextlib.suppress(LockstepError):  # what has arrived is here
            self._api.stop(name)
            while not self._api.status(name).is_final:
                if time.monotonic() > deadline:
                    return
                time.sleep(_POLL_S)
            self._api.forget(name)

    async def _receive(self, name: str, received: "_Arrival") -> None:
        text = ""
        pieces = self._api.tail(name)
        try:
            while not received.is_whole:
                text += await asyncio.wait_for(anext(pieces), _SILENCE_S)
                *lines, text = text.split("\n")
                for line in lines:
                    received.take(line)
        except StopAsyncIteration:
            received.take(text)
        except TimeoutError:
            raise DeskFailure(
                f"{self._api.address}: nothing came for {_SILENCE_S:g} s. Try again."
            ) from None
        finally:
            await pieces.aclose()

    def _start(
        self,
        verb: str,
        question: Mapping[str, Any],
        folder: Path | None,
        secrets: Mapping[str, str] | None,
    ) -> str:
        name = f"lockstep-desk-{randomness.token_hex(6)}"
        asked = base64.b64encode(json.dumps(question).encode()).decode()
        words = ["exec", "python", "-P", "-m", "cluster.desk", verb, asked]
        if secrets:
            words.append(self._api.upload(json.dumps(dict(secrets)).encode()))
        self._api.start(
            name, " ".join(words), str(folder) if folder else None, {"lockstep_desk": verb}, {}
        )
        return name

    def _explain(self, name: str, log: str) -> str:
        if "No module named" in log or "not found" in log:
            return (
                f"Lockstep is not installed for the `python` of {self._api.address}: "
                f"{log.strip().splitlines()[-1]} Install it on all nodes, and start Ray with that "
                "environment first in PATH."
            )
        return f"{self._api.address}: the job {name} gave no answer:\n{log[-2000:]}"


class _Arrival:
    """Files as they come, line by line, into a folder; checked by their digests."""

    def __init__(self, folder: Path) -> None:
        self.answer: dict[str, Any] | None = None
        self.is_whole = False
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()

    def take(self, line: str) -> None:
        """Take the next line; others than the desk's are passed over."""
        if line.startswith(PART) and self._file is not None:
            data = base64.b64decode(line.removeprefix(PART))
            self._digest.update(data)
            self._file.write(data)
        elif line.startswith(FILE):
            self._open(json.loads(line.removeprefix(FILE)))
        elif line.startswith(END):
            self._check(json.loads(line.removeprefix(END)))
        elif line.startswith(ANSWER):
            self.answer = json.loads(line.removeprefix(ANSWER))
            self.is_whole = True
        elif line.startswith(REFUSAL):
            raise UserError(json.loads(line.removeprefix(REFUSAL)))

    def close(self) -> None:
        """Let go of the file that has not arrived whole."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, name: str) -> None:
        path = self._folder / name
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise DeskFailure(f"the cluster sent a file named {name!r}, outside of the folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._digest = path.open("wb"), hashlib.sha256()

    def _check(self, digest: str) -> None:
        self.close()
        if self._digest.hexdigest() != digest:
            raise EnvironmentFailure("a file did not arrive as it was sent. Try again.")
