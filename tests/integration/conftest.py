"""One Ray and one set of rows for all integration tests of a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from cluster.runtime import Need, session

    with session(Need(4, 1, 0)):
        yield


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.jobs import write_data

    return write_data(tmp_path_factory.mktemp("rows"))
