"""Processes for tests of what happens at once: forked from one that has imported the registry."""

import multiprocessing as mp
from collections.abc import Callable
from typing import Any

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.registry_workers", "psycopg"])


def run_at_once(
    target: Callable[..., None], arguments: list[tuple[Any, ...]], timeout_s: float
) -> list[Any]:
    """Run a function in a process for each of the arguments, all at once; returns their answers.

    A barrier and a queue for the answer are added to the arguments.
    """
    barrier, answers = CONTEXT.Barrier(len(arguments)), CONTEXT.Queue()
    started = [CONTEXT.Process(target=target, args=(*a, barrier, answers)) for a in arguments]
    for process in started:
        process.start()
    try:
        return [answers.get(timeout=timeout_s) for _ in started]
    finally:
        for process in started:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def run_alone(target: Callable[..., None], arguments: tuple[Any, ...], timeout_s: float) -> Any:
    """Run a function in a process; returns its answer, or None where it died."""
    answers = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=target, args=(*arguments, answers))
    process.start()
    process.join(timeout_s)
    assert process.exitcode is not None, f"still running after {timeout_s} s"
    return None if answers.empty() else answers.get()
