"""What people see: the plan, progress, one line an epoch, the closing table.

A progress bar on a terminal, plain lines otherwise. Nothing here computes results.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lockstep.follow import RunPlan, SilentListener

_RATE_WINDOW_S = 5.0


def number(value: float) -> str:
    """A number for people: thousands with commas, small ones with four significant digits."""
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


class TrainingView:
    """Listens to a run and shows it; close it at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._plan: RunPlan | None = None
        self._recent: list[tuple[float, int]] = []
        self._converted: set[str] = set()

    def converting(self, role: str, done_bytes: int, all_bytes: int) -> None:
        """Show how far the conversion of a role's files is."""
        if role not in self._converted:
            self._converted.add(role)
            self.close()
            self._console.print(f"converting data.{role} to Parquet ...", highlight=False)
            if self._console.is_terminal:
                self._progress = Progress(
                    BarColumn(),
                    DownloadColumn(),
                    TimeRemainingColumn(),
                    console=self._console,
                    transient=True,
                )
                self._task = self._progress.add_task("", total=all_bytes)
                self._progress.start()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done_bytes)
        if done_bytes >= all_bytes:
            self.close()

    def planned(self, plan: RunPlan) -> None:
        """Show what is about to happen."""
        self._plan = plan
        job, data = plan.job, plan.data
        rows = ", ".join(
            f"{int(scan.block_rows.sum()):,} {role}" for role, scan in data.scans.items()
        )
        table = Table(title=f"{job.name}  (run {plan.folder.run_id})", show_header=False, box=None)
        table.title_justify = "left"
        table.add_row("workers", f"{job.cluster.workers} x {job.cluster.cpus_per_worker} CPU")
        table.add_row("rows", rows)
        table.add_row(
            "steps",
            f"{data.plan.steps_per_epoch:,} an epoch of {job.train.global_batch_size} rows, "
            f"{job.train.epochs} epochs",
        )
        layers = ", ".join(kind for _, kind, _ in plan.model.layers)
        table.add_row("model", f"{plan.model.parameters:,} parameters: {layers}")
        table.add_row("run folder", str(plan.folder.path))
        if plan.folder.is_resumed:
            table.add_row("resume", "from the newest checkpoint")
        self._console.print(table)

    def warned(self, warning: str) -> None:
        """Show a warning."""
        self._console.print(f"[yellow]warning:[/] {warning}", highlight=False)

    def stopping(self) -> None:
        """Say that a stop is under way."""
        self._console.print("stopping: waiting for a common step (Ctrl-C again ends at once)")

    def event(self, event: dict[str, Any]) -> None:
        """Show one live event."""
        kind = event["event"]
        handler = getattr(self, f"_show_{kind}", None)
        if handler is not None:
            handler(event)

    def close(self) -> None:
        """Take the progress bar away. Idempotent."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show_placing(self, event: dict[str, Any]) -> None:
        self._console.print(f"starting {event['workers']} workers ...")

    def _show_failure(self, event: dict[str, Any]) -> None:
        text = event["error"].splitlines()[0]
        self._console.print(f"[yellow]failure:[/] {text}", highlight=False)

    def _show_warning(self, event: dict[str, Any]) -> None:
        self.warned(event["warning"])

    def _show_chaos(self, event: dict[str, Any]) -> None:
        self._console.print(f"chaos: {event['fault']}", highlight=False)

    def _show_recovered(self, event: dict[str, Any]) -> None:
        self._console.print(
            f"recovered in {event['recovered_s']:.1f} s, {event['steps_replayed']} steps again",
            highlight=False,
        )

    def _show_pausing(self, event: dict[str, Any]) -> None:
        self._console.print(f"forming anew: {event['reason']}", highlight=False)

    def _show_hosts(self, event: dict[str, Any]) -> None:
        for host in event["replaced"]:
            self._console.print(f"rank {host['rank']} is on {host['node']} now", highlight=False)
        if event["lost"]:
            self.warned(f"{len(event['lost'])} workers are gone and not replaced.")

    def _show_stacks(self, event: dict[str, Any]) -> None:
        self._console.print(f"the workers' stacks: {event['path']}", soft_wrap=True)

    def _show_checkpoint_skipped(self, event: dict[str, Any]) -> None:
        self.warned(f"checkpoint skipped: {event['reason']}")

    def _show_checkpoint_failed(self, event: dict[str, Any]) -> None:
        self.warned(f"checkpoint not written, training goes on: {event['error']}")

    def _show_progress(self, event: dict[str, Any]) -> None:
        plan = self._plan
        if plan is None or not self._console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("loss {task.fields[loss]}  {task.fields[rate]} rows/s"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            total = plan.data.plan.steps_per_epoch * plan.job.train.epochs
            self._task = self._progress.add_task("", total=total, epoch="", loss="", rate="")
            self._progress.start()
        if self._task is not None:
            self._progress.update(
                self._task,
                completed=event["step"],
                epoch=f"{event['epoch'] + 1}/{plan.job.train.epochs}",
                loss=number(event["loss"]),
                rate=number(self._rate(event)),
            )

    def _rate(self, event: dict[str, Any]) -> float:
        """Rows a second over the last seconds."""
        plan = self._plan
        now = time.monotonic()
        self._recent.append((now, event["step"]))
        self._recent = [item for item in self._recent if now - item[0] <= _RATE_WINDOW_S]
        (begin, first), (end, last) = self._recent[0], self._recent[-1]
        if plan is None or end <= begin:
            return float(event["rows"]) / max(float(event["seconds"]), 1e-9)
        return (last - first) * plan.job.train.global_batch_size / (end - begin)

    def _show_epoch(self, event: dict[str, Any]) -> None:
        plan = self._plan
        epochs = plan.job.train.epochs if plan else "?"
        hidden = ("event", "epoch", "step", "learning_rate", "epoch_s", "rows_per_s")
        values = "  ".join(f"{k} {number(v)}" for k, v in event.items() if k not in hidden)
        self._console.print(
            f"epoch {event['epoch'] + 1}/{epochs}  {values}  "
            f"({event['epoch_s']:.1f} s, {number(round(event['rows_per_s']))} rows/s)",
            highlight=False,
        )


def show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """The closing table: test metrics beside the best constant's, throughput, places."""
    metrics = summary["metrics"]
    role = "test" if "test" in metrics else "validation" if "validation" in metrics else "train"
    table = Table(title=f"{role} metrics", title_justify="left")
    table.add_column("metric")
    table.add_column("model", justify="right")
    constant = metrics.get("constant", {}) if role == "test" else {}
    if constant:
        table.add_column("best constant", justify="right")
    for name, value in metrics.get(role, {}).items():
        row = [name, number(value)]
        if constant:
            row.append(number(constant[name]) if name in constant else "")
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{summary['rows_seen']:,} rows in {summary['steps']:,} steps by {summary['workers']} "
        f"workers, {number(round(summary['rows_per_s']))} rows/s while training, "
        f"{summary['wall_s']:.1f} s in all",
        highlight=False,
    )
    if summary["recoveries"]:
        console.print(f"{len(summary['recoveries'])} failures recovered", highlight=False)
    folder = summary["run_folder"]
    places = {"artifact": summary["artifact"], "report": f"{folder}/report.html"}
    if "version" in summary:
        places["registered"] = summary["version"]
    for label, path in places.items():
        console.print(f"{label}: {path}", soft_wrap=True, highlight=False)


def show_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """What chaos did to the weights; nothing where there was no comparison."""
    if comparison:
        console.print(
            f"weights after {comparison['failures']} failures and undisturbed: "
            f"{comparison['verdict']} (greatest difference {comparison['greatest']:.1e})",
            highlight=False,
        )


class VerifyView(SilentListener):
    """Shows how far a verification is."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def warned(self, warning: str) -> None:
        """Show a warning."""
        self._console.print(f"[yellow]warning:[/] {warning}", highlight=False)

    def event(self, event: dict[str, Any]) -> None:
        """Show one live event."""
        if event["event"] == "verified":
            self._console.print(f"{event['stage']}: done", highlight=False)

    def stopping(self) -> None:
        """Say that a stop is under way."""
        self._console.print("stopping ...")


def show_certificate(console: Console, certificate: Mapping[str, Any]) -> None:
    """Greatest differences from plain Keras, a column a number of workers, and the verdict."""
    comparisons = certificate["comparisons"]
    table = Table(
        title=f"{certificate['job']}: {certificate['steps']} steps of "
        f"{certificate['global_batch_size']} rows, greatest difference from plain Keras",
        title_justify="left",
    )
    table.add_column("")
    for each in comparisons:
        table.add_column(f"{each['workers']} workers", justify="right")
    rounding = certificate["rounding"]
    if rounding:
        table.add_column("plain, reordered", justify="right")
    for kind, title in (("layers", "weights"), ("training", "training"), ("evaluation", "eval")):
        for name in comparisons[0][kind]:
            found = [each[kind].get(name, math.inf) for each in comparisons]
            values = [
                f"{value:.1e}" for value in [*found, *([rounding[kind][name]] if rounding else [])]
            ]
            table.add_row(f"{title}: {name}", *values)
    console.print(table)
    for cause in sorted({cause for each in comparisons for cause in each["causes"]}):
        console.print(f"known cause: {cause}", highlight=False)
    for each in comparisons:
        console.print(
            f"{each['workers']} workers: {each['verdict']} (greatest {each['greatest']:.1e}, "
            f"tolerance {certificate['tolerance']:.0e})",
            highlight=False,
        )
    console.print(f"verdict: {certificate['verdict']}", highlight=False)
