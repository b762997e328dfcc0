"""What happens to every request before and after its route: the gate of the service.

Owns, in this order: a request id, the declared size of the body, the key, the rate, the memory for
the body, the answer to failures, the line in the log and the numbers. Routes below it see requests
with an account and plain bodies, and raise.

Failures are answered in the form that the protocol's clients read: `{"error": "text"}`, and below
`/openai` an object with message, type, param and code. What was not expected becomes a 500 that
tells a request id and nothing else; the log has the rest.
"""

import asyncio
import json
import logging
import random
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from configs.errors import EnvironmentFailure, LockstepError, UserError
from serving.accounts import Account
from serving.bodies import BodyBounds, Incoming, too_large
from serving.body_memory import Hold
from serving.errors import AuthenticationError, RefusedRequest, RequestError
from serving.limits import retry_after
from serving.service import Services

REQUEST_ID = "x-request-id"
TIMEOUT = "lockstep-timeout-s"

_LOG = logging.getLogger(__name__)
_OPEN = {"/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json"}
_UPLOADS = ("/v1/files", "/openai/v1/files")
_WITH_BODY = {"POST", "PUT", "PATCH"}
_GOOD_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_ACCOUNT = "account"
_ID = "request_id"


def account_of(request: Request) -> Account:
    """The account of a request that the front let in; a dependency for routers."""
    account: Account = request.scope[_ACCOUNT]
    return account


def deadline_of(request: Request, services: Services, begin: float | None = None) -> float:
    """When the answer must be there, by `time.monotonic()`: what the request says, or the default.

    Raises:
        RefusedRequest: The header is not a number of seconds.
    """
    limits = services.limits
    text = request.headers.get(TIMEOUT)
    seconds = limits.timeout_s
    if text is not None:
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds <= limits.most_timeout_s:
            raise RefusedRequest(
                f"{TIMEOUT} received {text[:40]!r}; seconds above 0 and up to "
                f"{limits.most_timeout_s:g} are allowed."
            )
    return (time.monotonic() if begin is None else begin) + seconds


def error_response(path: str, error: Exception) -> Response:
    """A failure in the form of the protocol that the path belongs to."""
    status, code, wait_s = 500, "internal", None
    message = str(error)
    if isinstance(error, RequestError):
        status, code, wait_s = error.status, error.code, error.retry_after_s
    elif isinstance(error, UserError):  # values that do not fit the model, most of all
        status, code = 400, "invalid_input"
    elif isinstance(error, EnvironmentFailure):
        status, code, wait_s = 503, "unavailable", 1.0
        message = "a part of the service does not answer; send the request again."
    headers = {"retry-after": retry_after(wait_s)} if wait_s is not None else {}
    if isinstance(error, RefusedRequest):
        headers |= error.headers
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    body: dict[str, Any] = {"error": message, "code": code}
    if path.startswith("/openai/"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Response(json.dumps(body), status, headers, "application/json")


class Front:
    """The gate as ASGI middleware.

    Args:
        app: What answers.
        services: The parts.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services
        self._in_flight = 0
        # Names of requests need not be secret, and a call for the kernel's randomness gives up the
        # GIL: under load it came back 0.3 ms later, when a lane's thread had done with it.
        self._names = random.Random(secrets.randbits(128))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; other kinds of scope pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        headers = _wanted(scope)
        given = headers.get(b"x-request-id", b"")
        request_id = given if _GOOD_ID.fullmatch(given) else self._new_id()
        scope[_ID] = request_id.decode()
        status = 500

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        self._in_flight += 1
        try:
            await self._answer(scope, headers, receive, send_on)
        except asyncio.CancelledError:
            status = 499  # the caller has gone
            raise
        finally:
            self._in_flight -= 1
            self._record(scope, status, time.perf_counter() - begin)

    def _new_id(self) -> bytes:
        return b"%016x" % self._names.getrandbits(64)

    async def _answer(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        path: str = scope["path"]
        has_begun = False
        hold: Hold | None = None

        async def send_once(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            bounds = self._bounds(path)
            length = _declared(headers, bounds)
            if path not in _OPEN and not (
                path == "/metrics" and self._services.limits.is_metrics_public
            ):
                account = await self._account(headers.get(b"authorization"))
                scope[_ACCOUNT] = account
                self._services.rates.admit(account)
                if scope["method"] in _WITH_BODY:
                    hold = Hold(self._services.bodies, account.user)
                    encoding = headers.get(b"content-encoding", b"").decode("latin-1")
                    receive = Incoming(receive, encoding, length, bounds, hold)
            await self._app(scope, receive, send_once)
        except (LockstepError, RequestError) as error:
            if isinstance(error, EnvironmentFailure):
                _LOG.error("request %s: %s", scope[_ID], error)
            if has_begun:
                raise
            await error_response(path, error)(scope, receive, send)
        except Exception as error:
            _LOG.exception("request %s failed", scope[_ID], exc_info=error)
            if has_begun:
                raise
            hidden = RequestError(
                f"the service failed; its log has more under request {scope[_ID]}.",
                500,
                "internal",
            )
            await error_response(path, hidden)(scope, receive, send)
        finally:
            if hold is not None:
                hold.end()

    async def _account(self, authorization: bytes | None) -> Account:
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise AuthenticationError(
                "no API key; `Authorization: Bearer lk_...` is needed. Ask the operator of this "
                "service for a key."
            )
        text = key.strip().decode("latin-1")
        accounts = self._services.accounts
        account = accounts.cached(text)
        if account is None:
            account = await asyncio.to_thread(accounts.authenticate, text)
        return account

    def _bounds(self, path: str) -> BodyBounds:
        limits = self._services.limits
        if path.startswith(_UPLOADS):  # goes to the disk as it comes
            return BodyBounds(limits.upload_bytes, None, None, is_charged=False)
        return BodyBounds(limits.body_bytes, limits.inflated_bytes, limits.most_timeout_s)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        services = self._services
        route = getattr(scope.get("route"), "path", "") or "none"
        services.metrics.requests.add(1, route, scope["method"], str(status))
        services.metrics.latency.observe(seconds, route)
        services.metrics.in_flight.set(self._in_flight)
        account = scope.get(_ACCOUNT)
        client = scope.get("client")
        services.log.write(
            scope[_ID],
            account.user if account else None,
            scope["method"],
            scope["path"],
            status,
            seconds,
            client[0] if client else "",
        )


def _wanted(scope: MutableMapping[str, Any]) -> dict[bytes, bytes]:
    """Headers by name; of those that came twice the last."""
    return dict(scope["headers"])


def _declared(headers: dict[bytes, bytes], bounds: BodyBounds) -> int | None:
    """The declared length of a body; refuses what declares too much, unread."""
    length = headers.get(b"content-length")
    if length is None:
        return None
    if not length.isdigit() or len(length) > 18:
        raise RefusedRequest("content-length must be a number of bytes.")
    if int(length) > bounds.bytes:
        raise too_large(bounds.bytes)
    return int(length)
