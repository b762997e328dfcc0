"""Bodies of requests: read within bounds, inflated within bounds, parsed within bounds.

Owns what a stranger can do with bytes. A body is never larger in memory than its bound, whatever
its headers promise and however well it was compressed. Large bodies are worked on in threads, so
that they do not hold up the small requests of others.
"""

import asyncio
import json
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

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
_IN_THREAD_BYTES = 64 * 2**10


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


async def read_body(request: Request, inflated_bytes: int) -> bytes:
    """The whole body, inflated.

    The bound of the bytes as sent is the front's (`serving.front`).

    Raises:
        RefusedRequest: 413 where it inflates to more, 415 for an unknown encoding, 400 where it is
            damaged.
    """
    body = await request.body()
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise RefusedRequest(
            f"received a body encoded as {encoding[:50]!r}; gzip and deflate are allowed.",
            415,
            "unsupported_encoding",
        )
    return await worked_on(lambda: inflate(body, encoding, inflated_bytes), len(body))


def inflate(body: bytes, encoding: str, most_bytes: int) -> bytes:
    """The bytes in a gzip or deflate body; stops as soon as there are too many.

    Raises:
        RefusedRequest: 413 where there are more than `most_bytes`, 400 where it is damaged.
    """
    is_raw = encoding == "deflate" and (not body or body[0] & 0x0F != 8)  # without zlib's header
    kind = -zlib.MAX_WBITS if is_raw else zlib.MAX_WBITS | (0 if encoding == "deflate" else 16)
    inflater = zlib.decompressobj(kind)
    try:
        out = inflater.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise RefusedRequest(
            f"the {encoding} body is damaged ({error}). Compress it anew."
        ) from None
    if len(out) > most_bytes:
        raise RefusedRequest(
            f"the body inflates to more than {most_bytes} bytes, which are allowed. Send the rows "
            "in parts, or as a batch job.",
            413,
            "body_too_large",
        )
    if not inflater.eof:
        raise RefusedRequest(f"the {encoding} body ends too early. Compress it anew.")
    return out


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
    return await asyncio.to_thread(work)


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
