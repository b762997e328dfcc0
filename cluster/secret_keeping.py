"""Secrets of submitted runs: environment variables that no file, command or record shows.

They travel under a name that nobody can guess, and wait in the memory of the cluster's head, by
run, until it has ended. Who may run code on the cluster can read them, as any of its runs could.
"""

import json
import os

from ray._raylet import GcsClient  # type: ignore[attr-defined]

from configs.errors import UserError

FORWARDED = "LOCKSTEP_FORWARDED"
"""Names of environment variables that all processes of a run get from its driver."""

_NAMESPACE = b"lockstep_secrets"


def forwarded() -> dict[str, str]:
    """The variables that this process, a run's driver, is to hand on."""
    names = os.environ.get(FORWARDED, "").split(",")
    return {name: os.environ[name] for name in names if name in os.environ}


def take_secrets(uri: str, run_id: str) -> None:
    """Take what a client has uploaded, and keep it for a run."""
    client = _client()
    content = client.internal_kv_get(uri.encode(), None)
    if content is None:
        raise UserError(f"the secrets of {run_id} have not arrived. Submit it again.")
    client.internal_kv_put(run_id.encode(), content, True, _NAMESPACE)
    client.internal_kv_del(uri.encode(), False, None)


def secrets_of(run_id: str) -> dict[str, str]:
    """The variables that are kept for a run."""
    content = _client().internal_kv_get(run_id.encode(), _NAMESPACE)
    secrets: dict[str, str] = json.loads(content) if content else {}
    return secrets


def drop_secrets(run_id: str) -> None:
    """Keep them no longer. Idempotent."""
    _client().internal_kv_del(run_id.encode(), False, _NAMESPACE)


def _client() -> GcsClient:
    return GcsClient(address=os.environ["RAY_ADDRESS"])
