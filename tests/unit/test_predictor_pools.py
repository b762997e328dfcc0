"""What the settings of a service make of its predictors."""

import os

import pytest

from cluster.pool import ProcessPool, stations_within
from configs.service import ServiceConfig
from serving import batch_process, dispatching
from serving.assembly import Settings, batch_config
from serving.batch_process import make_pool
from serving.dispatching import actors_within


def settings(tmp_path, **values):
    return Settings(ServiceConfig(**values), str(tmp_path), "0")


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "kept", "most"),
    [
        ({"CPU": 8.0}, 1, 0, 2, 6),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 1, 2, 2),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 0.5, 2, 4),
        ({"CPU": 3.0, "GPU": 8.0}, 1, 0.5, 2, 1),
        ({"CPU": 9.0}, 2, 0, 1, 4),
        ({"CPU": 1.0}, 1, 0, 1, 1),
        ({}, 1, 1, 0, 1),
    ],
)
def test_as_many_stations_as_cpus_and_gpus_say(resources, cpus, gpus, kept, most):
    assert stations_within(resources, cpus, gpus, kept) == most


def test_predictors_are_processes_one_a_cpu(tmp_path):
    made = dispatching.dispatching_config(settings(tmp_path))
    assert made.runner["max_predictors"] == os.cpu_count()
    pool = make_pool(made)
    assert isinstance(pool, ProcessPool)
    assert dispatching.dispatching_config(settings(tmp_path, predictors=3)).runner == {
        "max_predictors": 3
    }


def test_predictors_are_actors_with_gpus_where_that_is_said(tmp_path, monkeypatch):
    asked, made = [], []

    class Actors:
        def __init__(self, target, options, **resources):
            made.append((target, resources["cpus"], resources["gpus"]))

    def capacity(cpus, gpus, kept_cpus):
        asked.append((cpus, gpus, kept_cpus))
        return 7

    named = {"cluster.actors:ActorPool": Actors, "cluster.actors:capacity": capacity}
    monkeypatch.setattr(batch_process, "resolve", named.__getitem__)
    monkeypatch.setattr(dispatching, "resolve", named.__getitem__)
    values = {"predictor_pool": "actors", "predictor_gpus": 0.5, "replicas": 2, "max_replicas": 3}
    config = dispatching.dispatching_config(settings(tmp_path, **values))
    assert (config.runner["max_predictors"], asked) == (7, [(1, 0.5, 3)])
    assert isinstance(make_pool(config), Actors)
    assert made == [(batch_process.WORKER, 1, 0.5)]
    bounded = dispatching.dispatching_config(settings(tmp_path, predictors=4, **values))
    assert (bounded.runner["max_predictors"], len(asked)) == (4, 1)
    assert batch_config(settings(tmp_path, predictors=4, **values)) == bounded


def test_the_embedded_ray_has_room_foractors_within():
    assert actors_within(ServiceConfig(predictors=4)) == 0
    assert actors_within(ServiceConfig(predictor_pool="actors", predictors=4)) == 4
    assert actors_within(ServiceConfig(predictor_pool="actors")) == 1
    assert actors_within(ServiceConfig(predictor_pool="actors", predictors=0)) == 0
