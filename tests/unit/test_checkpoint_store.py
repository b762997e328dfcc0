"""Checkpoints at one place: the newest whole one is found, whatever is damaged or dies."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.errors import DataError, ReadError
from tests.support.stores import MemoryStores
from trainer.checkpoint import read_checkpoint, write_checkpoint
from trainer.checkpoint_manifest import ManifestError, load_manifest, parse_name
from trainer.checkpoint_store import CheckpointStore, Found, Origin
from trainer.errors import CheckpointError

OURS = Origin("run-1", "job-a")
OTHER_JOB = Origin("run-1", "job-b")
OTHER_RUN = Origin("run-2", "job-a")


def store_in(folder: Path | str, origin: Origin = OURS) -> CheckpointStore:
    return CheckpointStore(str(folder), origin, now=lambda: 1234.5)


def arrays_of(step: int, generation: int) -> dict[str, Any]:
    return {"model/value": np.full(50, step + generation / 1000), "empty": np.zeros(0, "f4")}


def save(store: CheckpointStore, step: int, generation: int = 1, **more: Any) -> str:
    meta = {"step": step, "generation": generation}
    return store.save(step, generation, arrays_of(step, generation), meta, **more)


def is_whole(found: Found | None) -> bool:
    """Whether all of it is of the step and generation that it says."""
    assert found is not None
    expected = arrays_of(found.step, found.generation)
    assert found.meta == {"step": found.step, "generation": found.generation}
    assert found.arrays.keys() == expected.keys()
    return all(np.array_equal(found.arrays[name], expected[name]) for name in expected)


def place_of(found: Found | None) -> tuple[int, int] | None:
    return None if found is None else (found.step, found.generation)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def stem(step: int, generation: int = 1) -> str:
    return f"step-{step:010d}-g{generation:06d}"


def files(*places: tuple[int, int]) -> list[str]:
    return sorted(f"{stem(*place)}.{end}" for place in places for end in ("h5", "json"))


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


def on_data(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: rewrite(path, change)


def on_manifest(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: rewrite(path.with_suffix(".json"), change)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "part").write_bytes(b"x")


def replace_by_other_step(path: Path) -> None:
    shutil.copy(path.parent / f"{stem(100)}.h5", path)


def replace_both_by_other_step(path: Path) -> None:
    for end in (".h5", ".json"):
        shutil.copy(path.parent / f"{stem(100)}{end}", path.with_suffix(end))


def by_other(origin: Origin) -> Callable[[Path], None]:
    def rewrite_all(path: Path) -> None:
        save(store_in(path.parent, origin), 200)

    return rewrite_all


H5, JSON = f"{stem(200)}.h5", f"{stem(200)}.json"
DIGEST = "is damaged: its digest does not fit its content."
DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "truncated": (on_data(lambda data: data[:-100]), H5, r"has \d+ bytes; its manifest says \d+."),
    "one byte more": (on_data(lambda data: data + b"\0"), H5, r"has \d+ bytes; .* says \d+."),
    "empty": (on_data(lambda data: b""), H5, r"has 0 bytes; its manifest says \d+."),
    "bit of an array": (
        on_data(lambda data: flip(data, data.index(np.float64(200.001).tobytes()))),
        H5,
        DIGEST,
    ),
    "bit of the end": (on_data(lambda data: flip(data, -1)), H5, DIGEST),
    "bit of the header": (on_data(lambda data: flip(data, 60)), H5, DIGEST),
    "bit of the padding": (on_data(lambda data: flip(data, 500)), H5, DIGEST),
    "bit of HDF5's header": (on_data(lambda data: flip(data, 520)), H5, DIGEST),
    "zeros": (on_data(lambda data: bytes(len(data))), H5, DIGEST),
    "no .h5": (Path.unlink, H5, "is missing; its manifest is there."),
    "folder for the .h5": (to_folder, H5, "is a folder; a file belongs there."),
    "other step's .h5": (
        replace_by_other_step,
        H5,
        "is whole, but not the file that its manifest describes.",
    ),
    "no manifest": (
        lambda path: path.with_suffix(".json").unlink(),
        H5,
        rf"is without a manifest \({JSON}\): its writer died, or an earlier version wrote it.",
    ),
    "folder for the manifest": (
        lambda path: to_folder(path.with_suffix(".json")),
        JSON,
        "is a folder; a manifest belongs there.",
    ),
    "empty manifest": (on_manifest(lambda data: b""), JSON, "is not JSON: Expecting value.*"),
    "truncated manifest": (on_manifest(lambda data: data[:-9]), JSON, "is not JSON: .*"),
    "no text": (on_manifest(lambda data: b"\xff\xfe\xfd\xfc"), JSON, "is not JSON: .*"),
    "other JSON": (
        on_manifest(lambda data: b"[1]"),
        JSON,
        "holds list where a mapping belongs.",
    ),
    "other format": (
        on_manifest(lambda data: data.replace(b'"format": 1', b'"format": 2')),
        JSON,
        "is of format 2; format 1 is understood.",
    ),
    "bit of the manifest": (
        on_manifest(lambda data: data.replace(b'"step": 200', b'"step": 201')),
        JSON,
        DIGEST,
    ),
    "pair of another step": (
        replace_both_by_other_step,
        JSON,
        rf"describes another file: {stem(100)}.h5, of step 100 and generation 1.",
    ),
    "other job": (by_other(OTHER_JOB), H5, r"is of another job \(job-b; this one is job-a\)."),
    "other run": (by_other(OTHER_RUN), H5, r"is of another run \(run-2; this one is run-1\)."),
}


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, damage, file, reason):
    store = store_in(tmp_path)
    save(store, 100)
    damage(Path(save(store, 200)))
    found, skipped = store.newest()
    assert place_of(found) == (100, 1)
    assert is_whole(found)
    (sentence,) = skipped
    assert sentence.startswith(f"{tmp_path}/{file} ")
    assert re.fullmatch(reason, sentence.removeprefix(f"{tmp_path}/{file} ")), sentence


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "other format", "no .h5"])
def test_without_a_whole_one_there_is_none_and_all_are_named(tmp_path, damage):
    store = store_in(tmp_path)
    for step in (100, 200):
        DAMAGES[damage][0](Path(save(store, step)))
    found, skipped = store.newest()
    assert found is None
    assert [stem(200) in skipped[0], stem(100) in skipped[1]] == [True, True]


def test_every_flipped_bit_is_found(tmp_path):
    store = store_in(tmp_path)
    save(store, 100)
    path = Path(save(store, 200))
    chance = np.random.default_rng(0)
    for file in (path, path.with_suffix(".json")):
        data = file.read_bytes()
        for place in chance.choice(len(data), 150, replace=False):
            file.write_bytes(flip(data, int(place)))
            found, skipped = store.newest()
            assert place_of(found) == (100, 1), (file, place)
            assert str(file) in skipped[0] or str(path) in skipped[0]
        file.write_bytes(data)
    assert place_of(store.newest()[0]) == (200, 1)


def test_one_of_the_future_is_named_and_skipped(tmp_path):
    store = store_in(tmp_path)
    save(store, 100, 3)
    path = save(store, 50, 4)
    found, skipped = store.newest(most_generation=3)
    assert place_of(found) == (100, 3)
    assert skipped == [
        f"{path} is of generation 4; none later than 3 can have written: it is damaged, or another "
        "writer's."
    ]
    assert place_of(store.newest(most_generation=4)[0]) == (50, 4)
    assert store.last_generation() == 4


@pytest.mark.parametrize("origin", [OTHER_JOB, OTHER_RUN])
def test_others_checkpoints_are_refused(tmp_path, origin):
    save(store_in(tmp_path, origin), 100, 9)
    write_checkpoint(tmp_path, "step-0000000001", {}, {})
    for most in (None, 1):
        with pytest.raises(CheckpointError) as error:
            store_in(tmp_path).newest(most)
        assert str(error.value) == (
            f"{tmp_path} holds checkpoints of run {origin.run_id}, job {origin.job}; those of run "
            "run-1, job job-a are allowed. Name another place in checkpoint.uri, or the run and "
            "the job that wrote them."
        )
    damaged = Path(save(store_in(tmp_path), 50))
    damaged.write_bytes(b"")
    assert store_in(tmp_path).newest()[0] is None  # one was ours: nothing to refuse


def test_checkpoints_of_earlier_versions_are_named(tmp_path):
    path = write_checkpoint(tmp_path, "step-0000000900", {}, {})
    store = store_in(tmp_path)
    assert not store.has_any()
    found, skipped = store.newest()
    assert found is None
    assert skipped[0].startswith(f"{path} is without a manifest (step-0000000900.json)")
    save(store, 5)
    assert store.has_any()
    assert place_of(store.newest()[0]) == (5, 1)
    store.clean()
    assert path.exists()


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


def test_a_second_one_of_the_same_step_takes_the_place_of_the_first(tmp_path):
    store = store_in(tmp_path)
    save(store, 5)
    store.save(5, 1, {}, {"second": True}, kind="epoch")
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


def test_damaged_ones_do_not_count_among_the_kept(tmp_path):
    store = store_in(tmp_path)
    save(store, 100)
    save(store, 150)
    for step, damage in ((200, "truncated"), (300, "no .h5"), (400, "no manifest")):
        DAMAGES[damage][0](Path(save(store, step)))
    store.prune(2, None, "auto")
    assert place_of(store.newest()[0]) == (150, 1)
    assert {f"{stem(100)}.h5", f"{stem(150)}.h5"} <= set(names(tmp_path))
    save(store, 250, 2)
    save(store, 260, 2)
    store.prune(2, None, "auto")
    assert names(tmp_path) == sorted([*files((250, 2), (260, 2)), f"{stem(400)}.h5"])


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
    assert not Path(tmp_path, f"{stem(200)}.json").exists()
    save(store, 200)
    store.clean()
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


def test_one_that_is_removed_while_it_is_looked_for_is_no_damage(tmp_path, monkeypatch):
    """The reader looks again, and finds those that its writer removed it for."""
    store, writer = store_in(tmp_path), store_in(tmp_path)
    save(writer, 100)
    real = storage.read_whole
    steps = iter([200, 300, 400])

    def race(path: str) -> bytes:
        step = next(steps, None)
        if step is not None:
            save(writer, step)
            writer.prune(1, None, "auto")
        return real(path)

    monkeypatch.setattr(storage, "read_whole", race)
    found, skipped = store.newest()
    assert (place_of(found), skipped) == ((400, 1), [])


def test_a_writer_that_never_stops_does_not_hold_the_reader_for_ever(tmp_path, monkeypatch):
    save(store_in(tmp_path), 100)

    def gone(path: str) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(storage, "read_whole", gone)
    with pytest.raises(CheckpointError, match="removed as fast as they were found, 5 times"):
        store_in(tmp_path).newest()


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


@pytest.mark.parametrize("change", [{"run_id": None}, {"more": 1}])
def test_a_manifest_with_other_fields_is_told(tmp_path, change, monkeypatch):
    path = Path(save(store_in(tmp_path), 1)).with_suffix(".json")
    values = {**json.loads(path.read_text()), **change}
    values = {name: value for name, value in values.items() if value is not None}
    del values["digest"]
    monkeypatch.setattr("trainer.checkpoint_manifest._digest", lambda values: None)
    with pytest.raises(ManifestError, match="has other fields than a manifest: .*(run_id|more)"):
        load_manifest(json.dumps(values).encode())
