"""Webhooks: a JSON object posted to whoever wants to know; it never hurts who posts.

Every wait has a bound, a redirect is not followed, and secrets come from the environment: neither
they nor the path of an address reach a message.
"""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from configs.pipeline import WebhookConfig
from lockstep.finite import dump_finite

_FIRST_WAIT_S = 1.0
_ANSWER_BYTES = 65_536


def post_webhook(
    hook: WebhookConfig,
    body: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Post a JSON object, null for what JSON cannot say; returns what went wrong, or nothing.

    Blocks for at most `attempts` time-outs and the waits between them. An answer of 4xx, but for
    408 and 429, is not asked for again. The receiver may see the same object more than once.

    Args:
        hook: Where to.
        body: What to post.
        environment: Where secrets are.
        sleep: Waits for so many seconds.
    """
    url = hook.url or environment.get(hook.url_from or "", "")
    missing = [name for name in hook.headers_from.values() if name not in environment]
    if hook.url_from and not url:
        missing.append(hook.url_from)
    if missing:
        return f"no webhook was called: the environment has no {', '.join(sorted(missing))}."
    parts = urlsplit(url)
    place = f"{parts.scheme}://{parts.hostname}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "no webhook was called: its URL is none of http:// or https://."
    headers = {"Content-Type": "application/json", "User-Agent": "lockstep"}
    headers |= {name: environment[variable] for name, variable in hook.headers_from.items()}
    data = dump_finite(body, default=str).encode()
    problem = ""
    for attempt in range(hook.attempts):
        if attempt:
            sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
        problem, is_final = _attempt(url, data, headers, hook.timeout_s)
        if not problem:
            return ""
        if is_final:
            break
    return f"the webhook at {place} was not told: {problem}."


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Headers with secrets go to the address that was named, and nowhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Redirects are answers like others."""
        return


def _attempt(
    url: str, data: bytes, headers: Mapping[str, str], timeout_s: float
) -> tuple[str, bool]:
    """What went wrong, and whether trying again would not help."""
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        request = urllib.request.Request(url, data, dict(headers), method="POST")
        with opener.open(request, timeout=timeout_s) as answer:
            answer.read(_ANSWER_BYTES)
        return "", True
    except urllib.error.HTTPError as error:
        error.close()
        is_final = error.code < 500 and error.code not in (408, 429)
        return f"it answered {error.code}", is_final
    except urllib.error.URLError as error:
        return f"it cannot be reached ({type(error.reason).__name__})", False
    except (OSError, http.client.HTTPException) as error:
        return f"it cannot be reached ({type(error).__name__})", False
    except ValueError:  # a header or an address that HTTP does not allow, shown by nobody
        return "a header or the address is not valid HTTP", True
