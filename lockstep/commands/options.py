"""What commands share: options by their meaning, and how results are printed."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from lockstep.finite import dump_finite

if TYPE_CHECKING:
    from rich.console import Console

JobFile = Annotated[Path, typer.Argument(help="A job file (YAML).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override a field of the job; repeatable."),
]
Address = Annotated[
    str | None, typer.Option(help="A Ray cluster to join; embedded Ray without it.")
]


def print_json(value: Any) -> None:
    """One JSON object on standard output; null for what JSON cannot say."""
    print(dump_finite(value, indent=2))


def console(is_stderr: bool) -> "Console":
    """Where tables and progress go."""
    from rich.console import Console

    return Console(stderr=is_stderr)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM asks for a clean stop, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def be_quiet() -> None:
    """Keep TensorFlow's own lines off the terminal; Python's errors still reach it.

    TensorFlow logs to descriptor 2 before it reads TF_CPP_MIN_LOG_LEVEL.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.ERROR)
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{option} received {text!r}; whole numbers with commas are allowed, such as 2,3."
        ) from None


def names(text: str) -> list[str]:
    """Names with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
