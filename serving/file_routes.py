"""A user's files over HTTP, the same for our own routes and for those of OpenAI's clients."""

from collections.abc import Callable
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.account_types import Account
from serving.batch_upload import listed, page_of, stored_upload, streamed
from serving.batch_wire import describe_file
from serving.batches import BatchService


class FileRoutes:
    """Handlers of files; those of jobs come with the subclasses.

    Args:
        service: Files and jobs.
        authenticate: Tells whose request it is, or raises.

    Attributes:
        most_files: The longest list that a client may ask for.
        service: Files and jobs.
        account_of: Tells whose request it is, or raises.
    """

    most_files: ClassVar[int] = 100

    def __init__(self, service: BatchService, authenticate: Callable[[Request], Account]) -> None:
        self.service, self.account_of = service, authenticate

    async def upload(self, request: Request) -> Response:
        """Store a file, whole; its name's end tells the format."""
        account = self.account_of(request)
        return JSONResponse(describe_file(await stored_upload(self.service, account, request)))

    def files(self, request: Request) -> Response:
        """Own files, newest first."""
        after, limit = page_of(request, most=self.most_files)
        found, has_more = self.service.files.page(
            self.account_of(request), request.query_params.get("purpose"), after, limit
        )
        return listed([describe_file(file) for file in found], has_more)

    def file(self, request: Request, file: str) -> Response:
        """What is known of a file."""
        return JSONResponse(describe_file(self.service.files.one(self.account_of(request), file)))

    def content(self, request: Request, file: str) -> Response:
        """The bytes of a file."""
        return streamed(self.service.files.content(self.account_of(request), file))

    def delete(self, request: Request, file: str) -> Response:
        """Remove a file."""
        self.service.files.delete(self.account_of(request), file)
        return JSONResponse({"id": file, "object": "file", "deleted": True})
