"""Small files of a run: JSON, whole or not at all, and logs of one JSON value a line."""

import json
import os
from pathlib import Path
from typing import Any


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a .jsonl file."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
