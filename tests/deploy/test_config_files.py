"""The files in the config maps are ones that Lockstep takes."""

import importlib

import pytest
import yaml

from tests.deploy.checks.references import DEPLOY
from tests.deploy.conftest import OVERLAYS

CONFIG = DEPLOY / "base" / "config"


def loader(module: str, name: str):
    """A loader of another part of Lockstep."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        pytest.skip(f"needs {module}.{name}")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pipeline_is_one_and_its_workers_have_pods(overlay, renders, tmp_path):
    load = loader("configs.load", "load_pipeline")
    objects = {(each["kind"], each["metadata"]["name"]): each for each in renders(overlay)}
    path = tmp_path / "pipeline.yaml"
    path.write_text(objects[("ConfigMap", "lockstep-pipeline")]["data"]["pipeline.yaml"])
    need = load(path).job.cluster
    group = objects[("RayJob", "retraining")]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] >= need.workers + need.standbys
    assert float(limits["cpu"]) >= need.cpus_per_worker


def test_the_services_settings_are_ones():
    load = loader("configs.load", "load_service")
    assert load(CONFIG / "service.yaml", {}).port == 8000


def test_the_pipelines_paths_are_on_the_volume():
    pipeline = yaml.safe_load((CONFIG / "pipeline.yaml").read_text())
    job = pipeline["job"]
    for path in (job["data"]["train"], job["runs_dir"]):
        assert path.startswith("/var/lib/lockstep/")
