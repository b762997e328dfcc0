"""What people see of a pipeline's run: a line a step, the training as always, the decision."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from lockstep.render import TrainingView, number

Result = dict[str, Any]

_VERDICTS = {True: "passed", False: "failed", None: "not judged"}


class RetrainView(TrainingView):
    """Listens to a pipeline and shows it; close it at the end."""

    def __init__(self, terminal: Console) -> None:
        super().__init__(terminal)
        self._terminal = terminal
        self._results: dict[str, Result] = {}

    def run(self, run_id: str, given_up: str, resumed_at: str) -> None:
        """Show which run this is."""
        if given_up:
            self._say(given_up)
        self._say(f"run {run_id}" + (f" goes on with {resumed_at}" if resumed_at else ""))

    def step(self, name: str, result: Result) -> None:
        """Show what a step came to."""
        self.close()
        self._results[name] = result
        told = _TOLD.get(name)
        if told is not None:
            self._say(f"{name}: {told(result)}")

    def _say(self, text: str) -> None:
        self._terminal.print(text, highlight=False, markup=False)


def _prepared(result: Result) -> str:
    rows = result["rows"]
    copied = f", {rows['train_rows']:,} train" if rows["train"] else ""
    return f"{rows['evaluation_rows']:,} rows judge{copied}"


def _evaluated(result: Result) -> str:
    parts = []
    champion = (result["champion"] or {}).get("metrics", {})
    for name, value in result["candidate"]["metrics"].items():
        beside = f" (champion {number(champion[name])})" if name in champion else ""
        parts.append(f"{name} {number(value)}{beside}")
    return ", ".join(parts)


def _decided(result: Result) -> str:
    passed = sum(check["is_passed"] is True for check in result["checks"])
    failed = len(result["reasons"])
    return f"{passed} checks passed" + (f", {failed} failed" if failed else "")


_TOLD: dict[str, Callable[[Result], str]] = {
    "discover": lambda result: str(result["reason"]),
    "prepare": _prepared,
    "evaluate": _evaluated,
    "decide": _decided,
    "register": lambda result: f"version {result['version']}",
}


def show_decision(terminal: Console, result: Result) -> None:
    """The checks as a table, and what was decided."""
    if result["checks"]:
        table = Table(box=None, title_justify="left")
        for heading in ("check", "metric", "where", "result"):
            table.add_column(heading)
        for check in result["checks"]:
            verdict = _VERDICTS[check["is_passed"]]
            kind = check["kind"].replace("_", " ")
            table.add_row(kind, check["metric"], check["where"] or "all rows", verdict)
        terminal.print(table)
    words = {"promoted": "promoted", "kept": "champion kept", "nothing_new": "nothing to do"}
    lines = [f"{words[result['decision']]}: {reason}" for reason in result["reasons"]]
    if result["report"]:
        lines.append(f"report: {result['report']}")
    for line in lines:
        terminal.print(line, highlight=False, markup=False, soft_wrap=True)
