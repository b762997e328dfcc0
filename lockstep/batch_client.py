"""A client of the batch service: the standard library, a server's URL and a key.

Owns what makes talking to a server over a network bearable: requests that may be repeated are
(submissions carry an idempotency key), waits are bounded, a key is never sent elsewhere than to the
server that was named, and a download appears whole, with the hashes of its manifest, or not at all.
"""

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from configs.errors import EnvironmentFailure, UserError

KEY_VARIABLE = "LOCKSTEP_API_KEY"
SERVER_VARIABLE = "LOCKSTEP_SERVER"
DEFAULT_SERVER = "http://127.0.0.1:8000"
ENDED = ("completed", "failed", "expired", "cancelled")

_TIMEOUT_S = 60.0
_ATTEMPTS = 4
_LONGEST_WAIT_S = 30.0
_BLOCK_BYTES = 2**20


class ServiceFailure(EnvironmentFailure):
    """The server does not answer, or not now."""


def read_key(key_file: Path | None) -> str:
    """The key in a file, or in the environment.

    Raises:
        UserError: There is none.
    """
    if key_file is not None:
        try:
            key = key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the key in {key_file}: {error}.") from None
    else:
        key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(
            f"no API key; one of `lockstep users add` is needed. Put it into {KEY_VARIABLE}, or "
            "into a file for --key-file."
        )
    return key


class BatchClient:
    """Talks to one server. Each call blocks until it is answered, for a bounded time.

    Args:
        server: `http://host:port` or `https://host`.
        key: The user's key.
        sleep: Waits so many seconds.

    Raises:
        UserError: The server's URL is none.
    """

    def __init__(self, server: str, key: str, sleep: Callable[[float], None] = time.sleep) -> None:
        parts = urllib.parse.urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UserError(
                f"--server received {server!r}; http://HOST:PORT and https://HOST are allowed."
            )
        self._server = server.rstrip("/")
        self._key, self._sleep = key, sleep
        self._opener = urllib.request.build_opener(_NoRedirects)

    def upload(self, path: Path) -> dict[str, Any]:
        """Store a local file; what the server says of it."""
        name = urllib.parse.quote(path.name)
        with path.open("rb") as data:
            headers = {
                "content-length": str(path.stat().st_size),
                "content-type": "application/octet-stream",
            }
            # Not repeated: half of a file that was lost is sent again by whoever asks again.
            return self._json("POST", f"/v1/files?filename={name}", data, headers, attempts=1)

    def submit(self, request: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
        """Take a job in, once, however often it is sent.

        Args:
            request: What `/v1/batches` takes.
            key: Its idempotency key; None: a new one.
        """
        headers = {
            "content-type": "application/json",
            "idempotency-key": key or uuid.uuid4().hex,
        }
        return self._json("POST", "/v1/batches", json.dumps(request).encode(), headers)

    def job(self, name: str) -> dict[str, Any]:
        """A job as it is now."""
        return self._json("GET", f"/v1/batches/{_quoted(name)}")

    def jobs(self, limit: int, everybody: bool = False) -> list[dict[str, Any]]:
        """The newest jobs."""
        query = f"limit={limit}" + ("&everybody=true" if everybody else "")
        found: list[dict[str, Any]] = self._json("GET", f"/v1/batches?{query}")["data"]
        return found

    def cancel(self, name: str) -> dict[str, Any]:
        """Have a job cancelled."""
        return self._json("POST", f"/v1/batches/{_quoted(name)}/cancel")

    def wait(
        self, name: str, tell: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> dict[str, Any]:
        """Wait until a job has ended; `tell` is given it now and then."""
        pause_s = 0.2
        while True:
            job = self.job(name)
            tell(job)
            if job["status"] in ENDED:
                return job
            self._sleep(pause_s)
            pause_s = min(5.0, pause_s * 1.3)

    def download(self, name: str, output: Path) -> dict[str, Any]:
        """The output of a job that has ended, as a folder; its manifest.

        Raises:
            UserError: The folder is there and not empty, or the job has no output.
            ServiceFailure: The server failed, or a part is not what the manifest says; nothing is
                left.
        """
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} is there already; a new or empty folder is needed.")
        path = f"/v1/batches/{_quoted(name)}/output"
        manifest = self._json("GET", path)
        partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            for entry in [*manifest["parts"], *manifest["errors"]]:
                self._fetch(f"{path}/{urllib.parse.quote(entry['name'])}", partial, entry)
            partial.mkdir(parents=True, exist_ok=True)
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            if manifest["is_complete"]:
                (partial / "_SUCCESS").write_bytes(b"\n")
            if output.exists():
                output.rmdir()
            partial.rename(output)
        except OSError as error:
            raise ServiceFailure(f"cannot write {output}: {error}. Nothing is left.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return manifest

    def _fetch(self, path: str, folder: Path, entry: dict[str, Any]) -> None:
        relative = Path(entry["name"])
        if relative.is_absolute() or ".." in relative.parts:
            raise ServiceFailure(f"the manifest names {entry['name']!r}, which is no part.")
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_ATTEMPTS):
            digest = hashlib.sha256()
            try:
                with self._open("GET", path) as answer, target.open("wb") as file:
                    while block := answer.read(_BLOCK_BYTES):
                        digest.update(block)
                        file.write(block)
            except (http.client.HTTPException, ConnectionError, TimeoutError):
                self._sleep(0.5 * 2**attempt)
                continue
            if digest.hexdigest() == entry["sha256"]:
                return
        raise ServiceFailure(
            f"{entry['name']} did not arrive as the manifest says, {_ATTEMPTS} times. Try again."
        )

    def _json(
        self,
        method: str,
        path: str,
        data: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        attempts: int = _ATTEMPTS,
    ) -> dict[str, Any]:
        with self._open(method, path, data, headers, attempts) as answer:
            try:
                found: dict[str, Any] = json.loads(answer.read())
            except ValueError:
                raise ServiceFailure(
                    f"{self._server} answered with something else than JSON. Check --server."
                ) from None
        return found

    def _open(
        self,
        method: str,
        path: str,
        data: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        attempts: int = _ATTEMPTS,
    ) -> Any:
        """The answer to a request; sent again where that may help, at most so many times."""
        sent = {"authorization": f"Bearer {self._key}", **(headers or {})}
        request = urllib.request.Request(self._server + path, data, sent, method=method)
        for attempt in range(1, attempts + 1):
            wait_s = 0.5 * 2**attempt
            try:
                return self._opener.open(request, timeout=_TIMEOUT_S)
            except urllib.error.HTTPError as error:
                message = _message(error)
                if error.code not in (429, 502, 503, 504):
                    raise UserError(f"{self._server} refused ({error.code}): {message}") from None
                failure = f"{self._server} cannot now ({error.code}): {message}"
                wait_s = _seconds(error.headers.get("retry-after"), wait_s)
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                reason = getattr(error, "reason", error)
                failure = f"{self._server} does not answer: {reason}. Check --server."
            if attempt == attempts or wait_s > _LONGEST_WAIT_S:
                raise ServiceFailure(failure)
            self._sleep(wait_s)
        raise ServiceFailure(failure)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to wherever it points."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read(10_000).decode(errors="replace")
    try:
        found = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text.strip()[:200] or error.reason
    return str(found)


def _seconds(text: str | None, default: float) -> float:
    try:
        return float(text) if text else default
    except ValueError:
        return default
