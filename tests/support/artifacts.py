"""Small artifact folders, whole as far as the registry looks: files and their manifest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = {
    "model.keras": b"a model",
    "saved_model/saved_model.pb": b"another",
    "signature.json": b"{}",
}


def write_artifact(
    folder: Path,
    files: Mapping[str, bytes] = FILES,
    lineage: Mapping[str, Any] | None = None,
) -> Path:
    """An artifact of these files; returns the folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    manifest = {"digest": whole, "files": digests, "lineage": dict(lineage or {})}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
