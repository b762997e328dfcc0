"""What the routes of batch jobs share: uploads, pages of listings, and bodies sent while read."""

import tempfile
from collections.abc import Iterator
from typing import IO, Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serving.account_types import Account
from serving.batch_tables import StoredFile
from serving.batches import BatchService
from serving.errors import BatchError

_SPOOLED_BYTES = 2**20
_BLOCK_BYTES = 2**20
_DIGITS = 9


async def stored_upload(service: BatchService, account: Account, request: Request) -> StoredFile:
    """The file of a request: a form's `file`, or the body under the name in `filename`.

    Raises:
        BatchError: There is none, or it is not allowed.
        QuotaExceeded: The user has too many bytes stored.
    """
    await run_in_threadpool(service.files.check_room, account, 0)  # before a byte is taken
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        name = request.query_params.get("filename", "")
        with tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES) as held:
            async for block in request.stream():
                held.write(block)
            return await run_in_threadpool(_keep, service, account, name, held, {})
    try:
        async with request.form(max_files=1, max_fields=16) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise BatchError("the form has no file.", "invalid_request", column="file")
            fields = {name: str(value) for name, value in form.items() if name != "file"}
            name = file.filename or ""
            return await run_in_threadpool(_keep, service, account, name, file.file, fields)
    except MultiPartException as error:
        text = f"the form cannot be read: {error.message}"
        raise BatchError(text, "invalid_request", status=400) from None


def _keep(
    service: BatchService, account: Account, name: str, held: IO[bytes], fields: dict[str, str]
) -> StoredFile:
    held.seek(0)
    text = fields.get("expires_after[seconds]")
    if text is not None and not 0 < _whole(text) < 1e8:
        raise BatchError(
            "expires_after[seconds] must be a number of seconds.", "invalid_request", status=400
        )
    blocks: Iterator[bytes] = iter(lambda: held.read(_BLOCK_BYTES), b"")
    return service.files.upload(
        account,
        name,
        blocks,
        purpose=fields.get("purpose", "batch"),
        expires_after_s=None if text is None else float(text),
    )


def page_of(request: Request, most: int = 100) -> tuple[str | None, int]:
    """`after` and `limit` of a listing.

    Raises:
        BatchError: The limit is none (400).
    """
    text = request.query_params.get("limit", "20")
    if not 1 <= _whole(text) <= most:
        raise BatchError(
            f"limit received {text[:20]!r}; 1 to {most} are allowed.",
            "invalid_request",
            status=400,
            column="limit",
        )
    return request.query_params.get("after"), int(text)


def _whole(text: str) -> int:
    """The number that a text of a few digits says; -1 for any other text."""
    is_number = len(text) <= _DIGITS and text.isascii() and text.isdecimal()
    return int(text) if is_number else -1


def listed(data: list[dict[str, Any]], has_more: bool) -> Response:
    """A page of a listing."""
    names = [entry["id"] for entry in data]
    page = {"object": "list", "data": data, "has_more": has_more}
    ends = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}
    return JSONResponse(page | ends)


def streamed(blocks: Iterator[bytes]) -> Response:
    """A body that is sent while it is read."""
    return StreamingResponse(blocks, media_type="application/octet-stream")
