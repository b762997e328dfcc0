"""Bodies of requests: read within bounds, inflated within bounds, parsed within bounds.

Owns what a stranger can do with bytes. A body is never larger in memory than its bound, whatever
its headers promise and however well it was compressed; all bodies together are charged to a bound
of the process and of their user (`serving.body_memory`). Large bodies are worked on in threads, so
that they do not hold up the small requests of others; these threads do nothing else, so that keys
can be looked up while all of them are busy.
"""

import asyncio
import io
import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Message, Receive

from serving.body_memory import Hold
from serving.errors import RefusedRequest

T = TypeVar("T")

ARROW_STREAM = "application/vnd.apache.arrow.stream"
ARROW_FILE = "application/vnd.apache.arrow.file"
PARQUET = "application/vnd.apache.parquet"
TABLES = (ARROW_STREAM, ARROW_FILE, PARQUET)

_AS_JSON = (  # what clients say of JSON: curl -d a form, tritonclient nothing
    *("", "application/json", "text/plain", "application/x-www-form-urlencoded"),
    *("application/octet-stream", "text/json"),
)
_ENCODINGS = ("gzip", "x-gzip", "deflate")
_IN_THREAD_BYTES = 64 * 2**10
_PIECE_BYTES = 2**20
_LIKELY_INFLATION = 16
_WORKERS = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "bodies")


def media_type(request: Request) -> str:
    """The type of a body without its parameters, in lower case; empty where none was said."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_is_json(request: Request) -> None:
    """Refuse bodies that say they are something else.

    Raises:
        RefusedRequest: 415.
    """
    kind = media_type(request)
    if kind not in _AS_JSON and not kind.endswith("+json"):
        raise RefusedRequest(
            f"received a body of type {kind[:100]!r}; application/json, {', '.join(TABLES)} are "
            "allowed here. Set Content-Type.",
            415,
            "unsupported_media_type",
        )


@dataclass(frozen=True)
class BodyBounds:
    """What one body may be.

    Attributes:
        bytes: As it is sent.
        inflated_bytes: After gzip or deflate; None: such bodies are not taken.
        seconds: Until it has come; None: any time.
        is_charged: Whether it stays in memory.
    """

    bytes: int
    inflated_bytes: int | None
    seconds: float | None
    is_charged: bool = True


class Incoming:
    """The `receive` of a route: what comes of a body, within bounds, charged, and inflated.

    Args:
        receive: The server's.
        encoding: The header Content-Encoding.
        length: Bytes that were declared, within the bounds; None where none were.
        bounds: Of this body.
        hold: Where its memory is charged.

    Raises:
        Overloaded: The memory of bodies does not hold what was declared.
    """

    def __init__(
        self, receive: Receive, encoding: str, length: int | None, bounds: BodyBounds, hold: Hold
    ) -> None:
        self._receive = receive
        self._encoding = encoding.strip().lower()
        self._is_declared = length is not None
        self._bounds = bounds
        self._hold = hold
        self._got = 0
        self._is_whole = False
        self._until: float | None = None
        if bounds.seconds is not None and (length is None or length > _IN_THREAD_BYTES):
            self._until = asyncio.get_running_loop().time() + bounds.seconds
        if length is not None and bounds.is_charged:
            hold.take(length)

    async def __call__(self) -> Message:
        """The next part; an encoded body comes in one.

        Raises:
            RefusedRequest: 413 where there is more than is allowed, 415 for an unknown encoding,
                400 where it is damaged, 408 where it does not come.
            Overloaded: The memory of bodies does not hold it.
        """
        if self._encoding in ("", "identity") or self._is_whole:
            return await self._next()
        most_bytes = self._bounds.inflated_bytes
        if most_bytes is None or self._encoding not in _ENCODINGS:
            raise _not_taken(self._encoding, most_bytes is not None)
        parts: list[bytes] = []
        has_more = True
        while has_more:
            message = await self._next()
            if message["type"] != "http.request":
                return message  # the caller has gone
            parts.append(message.get("body", b""))
            has_more = message.get("more_body", False)
        body, encoding, take = b"".join(parts), self._encoding, self._hold.take
        likely_bytes = _LIKELY_INFLATION * len(body)
        whole = await worked_on(lambda: inflate(body, encoding, most_bytes, take), likely_bytes)
        return {"type": "http.request", "body": whole, "more_body": False}

    async def _next(self) -> Message:
        if self._until is None or self._is_whole:
            message = await self._receive()
        else:
            try:
                async with asyncio.timeout_at(self._until):
                    message = await self._receive()
            except TimeoutError:
                raise RefusedRequest(
                    f"the body did not come within {self._bounds.seconds:g} s. Send it in parts, "
                    "or as a batch job.",
                    408,
                    "body_timeout",
                ) from None
        if message["type"] == "http.request":
            self._is_whole = not message.get("more_body", False)
            if not self._is_declared:  # else the server gives no more than was declared
                self._count(len(message.get("body", b"")))
        return message

    def _count(self, size: int) -> None:
        self._got += size
        if self._got > self._bounds.bytes:
            raise too_large(self._bounds.bytes)
        if self._bounds.is_charged:
            self._hold.take(size)


def too_large(most_bytes: int) -> RefusedRequest:
    """The refusal of a body that is larger than its bound as it is sent."""
    return RefusedRequest(
        f"the body is larger than {most_bytes} bytes, which are allowed here. Send it in parts, or "
        "as a batch job.",
        413,
        "body_too_large",
    )


def _not_taken(encoding: str, has_some: bool) -> RefusedRequest:
    allowed = "gzip and deflate are allowed" if has_some else "files are taken as they are"
    return RefusedRequest(
        f"received a body encoded as {encoding[:50]!r}; {allowed}. Set Content-Encoding.",
        415,
        "unsupported_encoding",
    )


def inflate(
    body: bytes, encoding: str, most_bytes: int, take: Callable[[int], None] = lambda _: None
) -> bytes:
    """The bytes in a gzip or deflate body; stops as soon as there are too many.

    Args:
        body: Whole.
        encoding: gzip, x-gzip or deflate.
        most_bytes: Beyond, it is refused.
        take: Is told of bytes before they are made; what it raises ends the work.

    Raises:
        RefusedRequest: 413 where there are more than `most_bytes`, 400 where it is damaged.
    """
    is_raw = encoding == "deflate" and (not body or body[0] & 0x0F != 8)  # without zlib's header
    kind = -zlib.MAX_WBITS if is_raw else zlib.MAX_WBITS | (0 if encoding == "deflate" else 16)
    inflater = zlib.decompressobj(kind)
    out = io.BytesIO()  # gives its bytes without a copy
    rest = body
    while not inflater.eof:
        likely_bytes = _LIKELY_INFLATION * len(body)  # small bodies are charged for small pieces
        piece_bytes = min(_PIECE_BYTES, likely_bytes + 64, most_bytes + 1 - out.tell())
        take(piece_bytes)
        try:
            piece = inflater.decompress(rest, piece_bytes)
        except zlib.error as error:
            raise RefusedRequest(
                f"the {encoding} body is damaged ({error}). Compress it anew."
            ) from None
        rest = inflater.unconsumed_tail
        out.write(piece)
        if out.tell() > most_bytes:
            raise RefusedRequest(
                f"the body inflates to more than {most_bytes} bytes, which are allowed. Send the "
                "rows in parts, or as a batch job.",
                413,
                "body_too_large",
            )
        if not piece and not inflater.eof:
            raise RefusedRequest(f"the {encoding} body ends too early. Compress it anew.")
    return out.getvalue()


def parse_json(body: bytes) -> Any:
    """A JSON document; NaN, Infinity and -Infinity are numbers, as for TensorFlow Serving.

    Raises:
        RefusedRequest: It is not JSON in UTF-8, or nested deeper than Python's parser goes, about a
            thousand levels.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedRequest(
            f"the body is not JSON that can be read ({reason}). Send one JSON object in UTF-8."
        ) from None


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RefusedRequest: It is none.
    """
    document = parse_json(body)
    if not isinstance(document, dict):
        raise RefusedRequest(f"received {_kind(document)} as the body; a JSON object is allowed.")
    return document


async def worked_on(work: Callable[[], T], size_bytes: int) -> T:
    """What `work` returns; in a thread where `size_bytes` say that it takes long."""
    if size_bytes < _IN_THREAD_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_WORKERS, work)


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
