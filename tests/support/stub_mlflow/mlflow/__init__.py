"""Stands in for MLflow in the sender's process: quick to import, and ill-mannered on demand.

STUB_MLFLOW names a file that receives calls; STUB_MLFLOW_MODE is ok, hang, slow, down, refuse, die
or absent_then_ok (down for the first two calls).
"""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

from mlflow.exceptions import MlflowException

print("View the run at ...")  # as MLflow does
_mode = os.environ.get("STUB_MLFLOW_MODE", "ok")
_calls = 0


def _call(name, **told):
    global _calls
    _calls += 1
    if _mode == "hang":
        time.sleep(600)
    elif _mode == "slow":
        time.sleep(0.4)
    elif _mode == "down" or (_mode == "absent_then_ok" and _calls <= 2):
        raise MlflowException("cannot reach http://me:secret@127.0.0.1:9", 500)
    elif _mode == "refuse" and name == "log_batch":
        raise MlflowException("no such thing", 400)
    elif _mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    with Path(os.environ["STUB_MLFLOW"]).open("a") as file:
        file.write(json.dumps({"call": name, **told}) + "\n")


class MlflowClient:
    def __init__(self, tracking_uri):
        self.uri = tracking_uri

    def get_experiment_by_name(self, name):
        _call("get_experiment_by_name", experiment=name)
        return SimpleNamespace(experiment_id="7")

    def search_runs(self, experiments, filter_string, max_results):
        _call("search_runs", filter=filter_string)
        return []

    def create_run(self, experiment, tags):
        _call("create_run", tags=tags)
        data = SimpleNamespace(params={})
        return SimpleNamespace(info=SimpleNamespace(run_id="mlflow-1"), data=data)

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        _call(
            "log_batch",
            metrics=[list(m) for m in metrics],
            params=dict(params),
            tags=dict(tags),
        )

    def log_artifact(self, run_id, path, folder):
        _call("log_artifact", path=path, folder=folder)

    def set_terminated(self, run_id, status):
        print("View the run at ...")
        _call("set_terminated", status=status)
