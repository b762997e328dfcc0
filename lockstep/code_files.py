"""The user's Python files that a job needs: those it names, and the local modules they import.

Only files below one folder travel; data and everything else stays.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import JobError
from configs.schema import Job


def code_files(job: Job, folder: Path) -> dict[str, bytes]:
    """Python files that the job names or that these import, by their path below `folder`.

    Raises:
        JobError: A file is missing, or cannot be parsed.
    """
    waiting = [path for name in _names(job.model_dump()) if (path := _inside(folder, name))]
    files: dict[str, bytes] = {}
    while waiting:
        path = waiting.pop()
        name = path.relative_to(folder.resolve()).as_posix()
        if name in files:
            continue
        try:
            files[name] = path.read_bytes()
            tree = ast.parse(files[name])
        except (OSError, SyntaxError, ValueError) as error:
            raise JobError(f"cannot pack {path}: {error}. Correct the file.") from None
        waiting += _imported(tree, path, folder.resolve())
    return dict(sorted(files.items()))


def _names(value: Any) -> Iterator[str]:
    """Every 'file.py' of a 'file.py:name' in a value, and of a 'package.module:name' its file."""
    if isinstance(value, dict):
        for key, element in value.items():
            yield from _names(key)
            yield from _names(element)
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _names(element)
    elif isinstance(value, str):
        place, separator, _ = value.partition(":")
        if separator and place.endswith(".py"):
            yield place
        elif separator and all(part.isidentifier() for part in place.split(".")):
            yield f"{place.replace('.', '/')}.py"


def _inside(folder: Path, name: str) -> Path | None:
    """The file of that name below the folder; of an installed package's module there is none."""
    path = (folder / name).resolve()
    return path if path.is_file() and path.is_relative_to(folder.resolve()) else None


def _imported(tree: ast.Module, path: Path, folder: Path) -> list[Path]:
    """Local files that a module's imports may mean; packages bring their __init__.py."""
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            modules += [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
    found: list[Path] = []
    for module in modules:
        parts = module.split(".")
        for root in {path.parent, folder}:
            for length in range(1, len(parts) + 1):
                place = root.joinpath(*parts[:length])
                found += [place.with_suffix(".py"), place / "__init__.py"]
    return [file.resolve() for file in found if file.is_file()]
