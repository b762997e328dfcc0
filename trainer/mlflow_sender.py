"""The process that speaks with MLflow for a run: items come in by lines, are sent, and accounted.

It belongs to `trainer.tracking`, which starts it, feeds it and may end it at any moment. Whatever
MLflow does (import slowly, hang, leak, refuse) happens here, away from the run. What cannot be sent
now is kept and tried again; what MLflow refuses for good is counted, and passed over.

Lines in: the opening, then items. Lines out: `{"run": id}` when the run is there, `{"sent": n}`,
`{"refused": n, "reason": text}`, `{"waiting": reason}`; each item is sent or refused once.
"""

import json
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

_AGAIN_S = (2.0, 5.0, 15.0, 60.0)
_KEPT_ITEMS = 10_000
_READ_AHEAD_ITEMS = 100
_PARAMS_A_BATCH = 100
_KEY_CHARACTERS = 250
_REASON_CHARACTERS = 300
_FILE_TRIES = 2
_FOR_GOOD = {400, 404, 405, 409, 413, 422}
"""Answers that the same request would get again; of 401 and 403 a changed right can make others."""

Item = dict[str, Any]


class MlflowRun:
    """One run of an experiment, found by its tags or made.

    Args:
        opening: `uri`, `experiment`, `tags`, `params`, and `find`: the tags by which a run that is
            gone on with is known, or null for a new one. Also `leave_s`, see `main`.
    """

    def __init__(self, opening: dict[str, Any]) -> None:
        self._client = MlflowClient(tracking_uri=opening["uri"])
        experiment = self._experiment_id(opening["experiment"])
        found = self._find(experiment, opening["find"]) if opening["find"] else None
        run = found or self._client.create_run(experiment, tags=opening["tags"])
        self.run_id: str = run.info.run_id
        self._known_steps: dict[str, set[int]] = {}
        if found is not None:
            self._client.update_run(self.run_id, status="RUNNING")
        self._send_params(opening["params"], run.data.params)
        self._is_new = found is None

    def send(self, item: Item) -> None:
        """Send one item."""
        kind = item["kind"]
        if kind == "metrics":
            self._send_metrics(item)
        elif kind == "file":
            self._client.log_artifact(self.run_id, item["path"], item["folder"])
        elif kind == "tags":
            tags = [RunTag(key, value) for key, value in item["tags"].items()]
            self._client.log_batch(self.run_id, tags=tags)
        else:
            self._client.set_terminated(self.run_id, item["status"])

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # another run has made it meanwhile
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def _find(self, experiment: str, tags: dict[str, str]) -> Any:
        text = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._client.search_runs([experiment], filter_string=text, max_results=1)
        return found[0] if found else None

    def _send_params(self, params: dict[str, str], known: dict[str, str]) -> None:
        """Parameters are for ever: what a resumed run has changed becomes a tag."""
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for first in range(0, len(new), _PARAMS_A_BATCH):
            self._client.log_batch(self.run_id, params=new[first : first + _PARAMS_A_BATCH])
        changed = {key for key, value in params.items() if known.get(key, value) != value}
        tags = [RunTag(f"resumed.{key}"[:_KEY_CHARACTERS], params[key]) for key in sorted(changed)]
        if tags:
            self._client.log_batch(self.run_id, tags=tags)

    def _send_metrics(self, item: Item) -> None:
        """Values of a step that are there already are not sent again: MLflow would keep both."""
        step, values = item["step"], dict(item["values"])
        for key in list(values):
            if step in self._steps_of(key):
                del values[key]
        if values:
            metrics = [Metric(key, value, item["time_ms"], step) for key, value in values.items()]
            self._client.log_batch(self.run_id, metrics=metrics)
        for key in values:
            self._known_steps[key].add(step)

    def _steps_of(self, key: str) -> set[int]:
        if key not in self._known_steps:
            history = [] if self._is_new else self._client.get_metric_history(self.run_id, key)
            self._known_steps[key] = {metric.step for metric in history}
        return self._known_steps[key]


class Sender:
    """Takes items, sends them in order, and tells what became of each."""

    def __init__(self, opening: dict[str, Any]) -> None:
        self._opening = opening
        self._run: MlflowRun | None = None
        self._waiting: deque[Item] = deque()
        self._failures = 0
        self._next_try = 0.0
        self._first_reason = ""

    @property
    def has_more(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._waiting) or self._run is None

    def take(self, item: Item) -> None:
        """Put an item behind the others."""
        if len(self._waiting) == _KEPT_ITEMS:
            self._refuse("more was waiting than is kept")
        self._waiting.append(item)

    def wait_s(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self._next_try - time.monotonic())

    def flush(self) -> None:
        """Send what can be sent now."""
        while self.has_more and not self.wait_s():
            item = self._waiting[0] if self._run is not None else None
            try:
                if item is None:
                    self._run = MlflowRun(self._opening)
                    _tell({"run": self._run.run_id})
                    continue
                if self._run is not None:
                    self._run.send(item)
            except Exception as error:  # whatever MLflow and what is below it raise
                self._failed(item, error)
                continue
            self._failures = 0
            self._waiting.popleft()
            _tell({"sent": 1})

    def _failed(self, item: Item | None, error: Exception) -> None:
        reason = _explain(error, self._opening["uri"])
        status = _status_of(error)
        self._failures += 1
        is_file = item is not None and item["kind"] == "file"  # its storage is another matter
        if item is not None and (status in _FOR_GOOD or is_file and self._failures >= _FILE_TRIES):
            self._failures = 0
            self._refuse(reason)
            return
        self._next_try = time.monotonic() + _AGAIN_S[min(self._failures, len(_AGAIN_S)) - 1]
        _tell({"waiting": reason})

    def _refuse(self, reason: str) -> None:
        self._waiting.popleft()
        _tell({"refused": 1, "reason": reason})


def _status_of(error: Exception) -> int | None:
    if not isinstance(error, MlflowException):
        return None
    return int(error.get_http_status_code())  # type: ignore[no-untyped-call]


def _explain(error: Exception, uri: str) -> str:
    """What went wrong, in a line, without what an address may hold of secrets."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text.replace(uri, "MLflow")
    return re.sub(r"//[^/\s@]*@", "//", text)[:_REASON_CHARACTERS]


def _tell(answer: dict[str, Any]) -> None:
    """One line, at the real standard output: MLflow prints to whatever is `sys.stdout`."""
    print(json.dumps(answer), file=sys.__stdout__, flush=True)


def main() -> None:
    """Send what comes in until the input ends and all of it is sent, or for `leave_s` longer."""
    os.nice(10)  # training goes first
    sys.stdout = sys.stderr  # what MLflow prints is no answer
    opening = json.loads(sys.stdin.readline())
    sender = Sender(opening)
    items: queue.Queue[Item | None] = queue.Queue(_READ_AHEAD_ITEMS)

    def read() -> None:
        for line in sys.stdin:
            items.put(json.loads(line))
        items.put(None)

    threading.Thread(target=read, name="reader", daemon=True).start()
    end: float | None = None
    while end is None or (sender.has_more and time.monotonic() < end):
        sender.flush()
        if end is not None:
            time.sleep(min(sender.wait_s(), max(0.0, end - time.monotonic())))
            continue
        try:
            item = items.get(timeout=sender.wait_s() if sender.has_more else None)
        except queue.Empty:
            continue
        if item is None:
            end = time.monotonic() + opening["leave_s"]
        else:
            sender.take(item)


if __name__ == "__main__":
    main()
