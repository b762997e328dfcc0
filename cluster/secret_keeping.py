"""Secrets of submitted runs: environment variables that no file, command or record shows.

They travel under a name that nobody can guess, and wait in the memory of the cluster's head, by
run, until it has ended. A run that ends by itself drops them; those of a run that could not are
swept out later. Who may run code on the cluster can read them, as any of its runs could.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined]

from configs.errors import UserError

FORWARDED = "LOCKSTEP_FORWARDED"
"""Names of environment variables that all processes of a run get from its driver."""

_NAMESPACE = b"lockstep_secrets"
_SPARE_S = 600.0  # from being kept to the start of a run's process: a submission takes less


def forwarded() -> dict[str, str]:
    """The variables that this process, a run's driver, is to hand on."""
    names = os.environ.get(FORWARDED, "").split(",")
    return {name: os.environ[name] for name in names if name in os.environ}


@contextlib.contextmanager
def taking_secrets(uri: str, run_id: str) -> Iterator[None]:
    """Take what a client has uploaded, and keep it for a run, unless the `with` block fails.

    Then there is what was kept before.
    """
    client, key = _client(), run_id.encode()
    content = client.internal_kv_get(uri.encode(), None)
    if content is None:
        raise UserError(f"the secrets of {run_id} have not arrived. Submit it again.")
    client.internal_kv_del(uri.encode(), False, None)
    before = client.internal_kv_get(key, _NAMESPACE)
    kept = {"kept_at": time.time(), "variables": json.loads(content)}
    client.internal_kv_put(key, json.dumps(kept).encode(), True, _NAMESPACE)
    is_taken = False
    try:
        yield
        is_taken = True
    finally:
        if not is_taken and before is None:
            drop_secrets(run_id)
        elif not is_taken:
            client.internal_kv_put(key, before, True, _NAMESPACE)


def secrets_of(run_id: str) -> dict[str, str]:
    """The variables that are kept for a run."""
    variables: dict[str, str] = _kept(run_id.encode())["variables"]
    return variables


def runs_with_old_secrets() -> set[str]:
    """Ids of runs whose secrets have been kept for ten minutes: a run that is to start has begun.

    Secrets of those that are not under way, nor wait in the queue, are nobody's any more.
    """
    keys = _client().internal_kv_keys(b"", _NAMESPACE)
    now = time.time()
    return {key.decode() for key in keys if now - _kept(key)["kept_at"] > _SPARE_S}


def drop_secrets(run_id: str) -> None:
    """Keep them no longer. Idempotent."""
    _client().internal_kv_del(run_id.encode(), False, _NAMESPACE)


def _kept(key: bytes) -> dict[str, Any]:
    content = _client().internal_kv_get(key, _NAMESPACE)
    kept: dict[str, Any] = json.loads(content) if content else {}
    return {"kept_at": time.time(), "variables": {}, **kept}


def _client() -> GcsClient:
    return GcsClient(address=os.environ["RAY_ADDRESS"])
