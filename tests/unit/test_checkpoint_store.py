"""Checkpoints at one place: the newest is found, the best is kept, and a failure shows nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.errors import DataError, ReadError
from tests.support.checkpoints import (
    OTHER_JOB,
    OTHER_RUN,
    arrays_of,
    files,
    is_whole,
    names,
    place_of,
    save,
    stem,
    store_in,
)
from tests.support.stores import MemoryStores
from trainer.checkpoint import read_checkpoint
from trainer.checkpoint_manifest import parse_name
from trainer.errors import CheckpointError
from trainer.metric_names import is_more_better


def test_what_is_saved_is_found(tmp_path):
    store = store_in(tmp_path / "new" / "folder")
    assert not store.has_any()
    assert store.newest() == (None, [])
    assert store.last_generation() == 0
    path = save(store, 7, 2, kind="epoch", metrics={"val_mae": 0.5, "loss": float("nan")})
    assert path == f"{tmp_path}/new/folder/{stem(7, 2)}.h5"
    found, skipped = store_in(tmp_path / "new" / "folder").newest()
    assert skipped == []
    assert is_whole(found)
    assert found is not None
    assert found.path == path
    assert read_checkpoint(path)[1] == found.meta
    assert store.has_any()
    assert store.last_generation() == 2
    assert names(tmp_path / "new" / "folder") == files((7, 2))


def test_the_manifest_says_what_it_is(tmp_path):
    path = Path(save(store_in(tmp_path), 7, 2, kind="epoch", metrics={"val_mae": np.float32(0.5)}))
    values = json.loads(path.with_suffix(".json").read_text())
    assert {name: values[name] for name in sorted(values) if name not in ("sha256", "digest")} == {
        "format": 1,
        "run_id": "run-1",
        "job": "job-a",
        "step": 7,
        "generation": 2,
        "kind": "epoch",
        "file": path.name,
        "size_bytes": path.stat().st_size,
        "metrics": {"val_mae": 0.5},
        "time": 1234.5,
        "versions": values["versions"],
    }
    assert sorted(values["versions"]) == ["keras", "tensorflow"]
    assert values["sha256"] in path.read_bytes()[:512].decode()


def test_generations_come_before_steps(tmp_path):
    store = store_in(tmp_path)
    for step in (100, 200, 300):
        save(store, step, 1)
    assert place_of(store.newest()[0]) == (300, 1)  # generation 2 died before its first save
    save(store, 150, 2)
    found, skipped = store.newest()
    assert (place_of(found), skipped) == ((150, 2), [])
    save(store, 250, 2)
    save(store, 160, 3)
    save(store, 400, 1)  # a writer that was superseded
    assert place_of(store.newest()[0]) == (160, 3)
    assert place_of(store.newest(3)[0]) == (160, 3)


def test_steps_and_generations_of_any_length_are_ordered_as_numbers(tmp_path):
    store = store_in(tmp_path)
    for step, generation in ((9_999_999_999, 1), (8, 999_999), (5, 1_000_000)):
        save(store, step, generation)
    assert place_of(store.newest()[0]) == (5, 1_000_000)
    assert store.last_generation() == 1_000_000


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    store = store_in(tmp_path)
    save(store, 5)
    others = ["notes.txt", "step-5.h5", f"{stem(6)}.h5.bak", f"x{stem(7)}.h5", "final.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
        assert parse_name(name) is None
    assert store.newest()[1] == []
    store.prune(1, None, "auto")
    store.clean()
    assert names(tmp_path) == sorted([*files((5, 1)), *others])


def test_a_second_one_of_the_same_step_takes_the_place_of_the_first(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    save(store, 4)
    path = save(store, 5)
    seen: list[tuple[Any, list[str]]] = []
    real = storage.write_whole

    def look_first(path: str, *pieces: Any) -> None:
        found, skipped = store.newest()
        seen.append((place_of(found), [one.partition(" (")[0] for one in skipped]))
        real(path, *pieces)

    monkeypatch.setattr(storage, "write_whole", look_first)
    store.save(5, 1, {}, {"second": True}, kind="epoch")
    # The new .h5 never stands beside the old manifest.
    assert seen == [((4, 1), []), ((4, 1), [f"{path} is without a manifest"])]
    found, skipped = store.newest()
    assert found is not None
    assert (found.meta, skipped) == ({"second": True}, [])


def test_the_newest_are_kept_by_generation_and_step(tmp_path):
    store = store_in(tmp_path)
    for step, generation in ((100, 1), (200, 1), (300, 1), (150, 2), (160, 3)):
        save(store, step, generation)
    removed = store.prune(2, None, "auto")
    assert sorted(removed) == [f"{tmp_path}/{stem(step)}.h5" for step in (100, 200, 300)]
    assert names(tmp_path) == files((150, 2), (160, 3))
    assert store.prune(2, None, "auto") == []
    assert store_in(tmp_path).prune(1, None, "auto") == [f"{tmp_path}/{stem(150, 2)}.h5"]


@pytest.mark.parametrize(
    ("metric", "mode", "best"),
    [
        ("val_mae", "auto", 200),
        ("val_accuracy", "auto", 300),
        ("val_mae", "max", 100),
        ("val_accuracy", "min", 100),
        ("val_other", "auto", None),
    ],
)
def test_the_best_is_kept_too(tmp_path, metric, mode, best):
    values = {100: (0.9, 0.1), 200: (0.2, 0.2), 300: (0.2, 0.8), 400: (float("nan"), 0.8)}
    store = store_in(tmp_path)
    for step, (mae, accuracy) in values.items():
        save(store, step, metrics={"val_mae": mae, "val_accuracy": accuracy})
        store.prune(1, metric, mode)
    save(store, 500)
    for one in (store, store_in(tmp_path)):  # also who has not written them
        one.prune(1, metric, mode)
        assert names(tmp_path) == files((500, 1), *([] if best is None else [(best, 1)]))


def test_others_checkpoints_are_never_removed(tmp_path):
    for origin in (OTHER_JOB, OTHER_RUN):
        store_in(tmp_path, origin).save(1, len(names(tmp_path)) + 1, {}, {})
    before = names(tmp_path)
    store = store_in(tmp_path)
    save(store, 5, 9)
    store.prune(1, None, "auto")
    store.clean()
    assert set(before) <= set(names(tmp_path))


def test_the_manifest_is_removed_first_and_written_last(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    seen: list[tuple[str, str]] = []
    for action in ("write_whole", "remove"):
        real = getattr(storage, action)

        def watched(path: str, *more: Any, action: str = action, real: Any = real) -> None:
            seen.append((action, path.rpartition(".")[2]))
            real(path, *more)

        monkeypatch.setattr(storage, action, watched)
    save(store, 1)
    save(store, 2)
    store.prune(1, None, "auto")
    assert seen == [
        *([("write_whole", "h5"), ("write_whole", "json")] * 2),
        *[("remove", "json"), ("remove", "h5")],
    ]


def test_leftovers_of_dead_writers_are_removed(tmp_path):
    store = store_in(tmp_path)
    for step in (100, 200, 300):
        path = Path(save(store, step))
        if step != 200:
            path.with_suffix(".json").unlink()
    partial = [f".{stem(400)}.h5.0a1b2c3d.partial", f".{stem(400)}.json.0a1b2c3d.partial"]
    for name in (*partial, ".other.partial"):
        (tmp_path / name).write_bytes(b"x")
    store.clean()
    assert names(tmp_path) == sorted([*files((200, 1)), f"{stem(300)}.h5", ".other.partial"])


def test_the_trained_weights_are_apart(tmp_path):
    store = store_in(tmp_path)
    assert store.final() == (None, [])
    path = store.save_final(2, arrays_of(0, 2), {"step": 0, "generation": 2})
    assert path == f"{tmp_path}/final-g000002.h5"
    assert not store.has_any()
    assert store.newest() == (None, [])
    save(store, 10, 1)
    save(store, 20, 1)
    store.prune(1, None, "auto")
    found, skipped = store.final()
    assert (place_of(found), skipped) == ((0, 2), [])
    assert is_whole(found)
    later = store.save_final(3, {}, {}, step=40)
    assert place_of(store.final()[0]) == (40, 3)
    Path(later).write_bytes(b"")
    found, skipped = store.final()
    assert place_of(found) == (0, 2)
    assert skipped[0].startswith(f"{later} has 0 bytes")
    assert store.last_generation() == 3


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("calls", range(6))
@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, broken, calls):
    """Each call on the way fails once: two of replace, four of fsync."""
    store = store_in(tmp_path)
    save(store, 100)
    real, made = getattr(os, broken), [0]

    def fail_once(*arguments: Any) -> None:
        made[0] += 1
        no_space() if made[0] == calls + 1 else real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail_once)
        if calls >= {"fsync": 4, "replace": 2}[broken]:
            save(store, 200)
            assert made[0] == {"fsync": 4, "replace": 2}[broken]
            return
        with pytest.raises(CheckpointError) as error:
            save(store, 200)
    assert str(error.value) == (
        f"cannot write {tmp_path}/{stem(200)}.h5: [Errno 28] No space left on device. Free the "
        "storage, or name another place in checkpoint.uri."
    )
    assert place_of(store.newest()[0]) == (100, 1)
    assert names(tmp_path) == files((100, 1))
    save(store, 200)
    assert names(tmp_path) == files((100, 1), (200, 1))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStores:
    stores = MemoryStores(monkeypatch)
    stores.put("s3://bucket/run/checkpoints/.keep", b"")
    return stores


@pytest.mark.parametrize("failure", [ReadError("it failed."), DataError("it refuses.")])
@pytest.mark.parametrize("end", [".h5", ".json"])
def test_a_store_that_fails_shows_nothing(memory, monkeypatch, failure, end):
    store = store_in("s3://bucket/run/checkpoints/")
    save(store, 100)
    real = storage.write_whole

    def fail(path: str, *pieces: Any) -> None:
        if path.endswith(end):
            raise failure
        real(path, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_whole", fail)
        with pytest.raises(CheckpointError) as error:
            save(store, 200)
    assert str(error.value) == (
        f"cannot write s3://bucket/run/checkpoints/{stem(200)}.h5: {failure}"
    )
    found, skipped = store.newest()
    assert place_of(found) == (100, 1)
    assert is_whole(found)
    assert len(skipped) == (end == ".json")
    save(store, 300)
    store.clean()
    assert store.newest()[1] == []
    assert store.prune(1, None, "auto") == [f"s3://bucket/run/checkpoints/{stem(100)}.h5"]


@pytest.mark.parametrize("end", [".h5", ".json"])
def test_a_store_that_fails_while_reading_is_no_damage(memory, monkeypatch, end):
    """To go on from an older one, because the store was busy, would be a silent loss."""
    store = store_in("s3://bucket/run/checkpoints")
    save(store, 100)
    save(store, 200)
    real = storage.read_whole

    def fail(path: str) -> bytes:
        if path.endswith(end):
            raise ReadError("s3://bucket: the store failed.")
        return real(path)

    monkeypatch.setattr(storage, "read_whole", fail)
    with pytest.raises(CheckpointError, match="cannot be reached: s3://bucket: the store failed"):
        store.newest()


def test_a_place_that_is_no_folder_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = store_in(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write .*file/step-.*exists.*Check the stor"):
        save(store, 1)
    with pytest.raises(CheckpointError, match="storage failed: .*Not a directory.* Check the stor"):
        store.newest()


def test_file_uris_and_relative_paths_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save(store_in("a/b/"), 1) == f"{tmp_path}/a/b/{stem(1)}.h5"
    assert save(store_in(f"file://{tmp_path}/a/b"), 2) == f"{tmp_path}/a/b/{stem(2)}.h5"


def test_metrics_of_which_more_is_better_are_known_by_their_names():
    more = ("accuracy", "val_auc", "val_sparse_categorical_accuracy", "F1_score", "r2", "acc")
    for name in (*more, "val_mean_io_u", "one_hot_io_u", "f_beta_score", "fbeta_score", "auc_2"):
        assert is_more_better(name), name
    less = ("loss", "val_mae", "false_positives", "mine", "error2", "hour2", "space", "top1")
    for name in less:
        assert not is_more_better(name), name


def test_neither_tensorflow_nor_ray_is_needed():
    code = (
        "import sys, trainer.checkpoint_store; "
        "print(sorted({'tensorflow', 'keras', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_who_may_write_and_not_remove_is_told(memory, monkeypatch):
    store = store_in("s3://bucket/run/checkpoints")
    save(store, 100)
    save(store, 200)

    def refuse(path: str) -> None:
        raise DataError(f"{path}: the store refuses access.")

    monkeypatch.setattr(storage, "remove", refuse)
    with pytest.raises(CheckpointError, match="old checkpoints cannot be removed: s3://.* refuses"):
        store.prune(1, None, "auto")
    assert place_of(store.newest()[0]) == (200, 1)
