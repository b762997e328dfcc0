"""The process that imports: what it may see, and what happens when it is lost."""

import json
import os
import resource
import time

import pytest

from configs.errors import UserError
from lockstep.importing import ImportOptions, import_file, parse_shape
from registry.errors import RegistryError
from trainer import importing
from trainer.errors import ImportRefused
from trainer.importing import ImportFailure, ImportRequest, import_model


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Runs an import whose process does a deed."""
    monkeypatch.setattr(importing, "WORKER", "tests.support.bad_importers")
    model = tmp_path / "model.h5"
    model.touch()

    def run(deed, **limits):
        settings = {"timeout_s": 20.0, "memory_mb": 1000, **limits}
        request = ImportRequest(str(model), str(tmp_path / "out"), label=deed, **settings)
        return import_model(request)

    return run


def test_a_process_that_hangs_is_ended(ask):
    before = time.monotonic()
    with pytest.raises(ImportFailure, match=r"took more than 0.3 s.*--timeout-s"):
        ask("hang", timeout_s=0.3)
    assert time.monotonic() - before < 5


def test_a_process_that_eats_memory_is_ended(ask):
    with pytest.raises(ImportFailure, match=r"took more than 1000 MB.*--memory-mb"):
        ask("eat")


def test_a_process_that_crashes_is_told_by_its_signal(ask):
    with pytest.raises(ImportFailure, match="model.h5 ended with SIGSEGV"):
        ask("crash")


def test_a_process_that_fills_the_disk_is_stopped(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "_WRITTEN_FACTOR", 0.1)
    with pytest.raises(ImportFailure, match="ended with"):
        ask("fill")
    assert (tmp_path / "out").stat().st_size <= 100_000_000


def test_a_process_without_an_answer_is_a_failure(ask):
    with pytest.raises(ImportFailure, match="ended with status 0"):
        ask("silence")


def test_children_of_the_process_end_with_it(ask, tmp_path):
    with pytest.raises(ImportFailure, match="took more than"):
        ask("fork", timeout_s=1.0)
    group = int((tmp_path / "out").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
    pytest.fail("a child is still there")


def test_the_process_sees_no_secrets(ask, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("LOCKSTEP_DATABASE", "postgresql://u:hidden@h/d")
    with pytest.raises(ImportRefused) as told:
        ask("tell")
    seen = json.loads(str(told.value))
    assert "hidden" not in str(told.value)
    assert {"AWS_SECRET_ACCESS_KEY", "LOCKSTEP_DATABASE"} & seen.keys() == set()
    assert seen["CUDA_VISIBLE_DEVICES"] == "-1"


def test_mistakes_are_told_without_a_process(tmp_path):
    with pytest.raises(ImportRefused, match="there is no model at"):
        import_model(ImportRequest(str(tmp_path / "none.h5"), str(tmp_path / "out")))
    (tmp_path / "m.h5").touch()
    for limits, words in [
        ({"memory_mb": 10}, "--memory-mb received 10; 1000 to 100000000 MB are allowed"),
        ({"memory_mb": 10**12}, "--memory-mb received"),
        ({"timeout_s": 0.0}, "--timeout-s received 0; more than 0"),
        ({"timeout_s": float("nan")}, "--timeout-s received nan"),
        ({"timeout_s": float("inf")}, "--timeout-s received inf"),
        ({"timeout_s": 1e18}, "at most 604800 s, a week"),
    ]:
        request = ImportRequest(str(tmp_path / "m.h5"), str(tmp_path / "out"), **limits)
        with pytest.raises(UserError, match=words):
            import_model(request)


@pytest.mark.parametrize("deed", ["crash_with_files", "hang_with_files"])
def test_what_a_lost_process_unpacked_is_removed(ask, tmp_path, monkeypatch, deed):
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setenv("TMPDIR", str(room))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(ImportFailure):
        ask(deed, timeout_s=2.0)
    assert (tmp_path / "out").read_text().startswith(str(room))  # it was there
    assert list(room.iterdir()) == []


def test_a_limit_that_cannot_be_set_is_no_reason_to_leave_out_others(monkeypatch):
    given = {}

    def prlimit(pid, kind, limits):
        if kind == resource.RLIMIT_CPU:
            raise PermissionError
        given[kind] = limits

    hard = {resource.RLIMIT_FSIZE: 7_000_000}
    monkeypatch.setattr(resource, "prlimit", prlimit)
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (0, hard.get(kind, resource.RLIM_INFINITY))
    )
    importing._limit(1, ImportRequest("m.h5", "out", memory_mb=1000))
    assert given == {
        resource.RLIMIT_FSIZE: (7_000_000, 7_000_000),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_DATA: (4_000_000_000, 4_000_000_000),
    }


@pytest.mark.parametrize(
    ("name", "alias", "words"),
    [("a/b", "", "'a/b' as a model's name"), ("flights", "3rd", "'3rd' as an alias")],
)
def test_name_and_alias_are_checked_before_anything_is_imported(monkeypatch, name, alias, words):
    asked = []
    monkeypatch.setattr("lockstep.importing.import_model", asked.append)
    with pytest.raises(RegistryError, match=words):
        import_file(None, "m.h5", name, ImportOptions(alias=alias))
    assert asked == []


def test_a_shape_is_lengths_with_commas():
    assert parse_shape("") == ()
    assert parse_shape("28, 28,1") == (28, 28, 1)
    for wrong in ("28x28", "0,3", "-1", "a"):
        with pytest.raises(UserError, match="--input-shape received"):
            parse_shape(wrong)
