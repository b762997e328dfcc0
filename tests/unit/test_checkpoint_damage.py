"""Checkpoints that are damaged, or of others: each is named, and the one before is used."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from tests.support.checkpoints import (
    OTHER_JOB,
    OTHER_RUN,
    files,
    is_whole,
    names,
    place_of,
    save,
    stem,
    store_in,
)
from trainer.checkpoint import write_checkpoint
from trainer.checkpoint_manifest import ManifestError, load_manifest
from trainer.checkpoint_store import Origin
from trainer.errors import CheckpointError


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


def test_damaged_ones_do_not_count_among_the_kept(tmp_path):
    store = store_in(tmp_path)
    save(store, 100)
    save(store, 150)
    damages = ("truncated", "no .h5", "folder for the .h5", "no manifest")
    for step, damage in zip((200, 300, 350, 400), damages, strict=True):
        DAMAGES[damage][0](Path(save(store, step)))
    store.prune(2, None, "auto")
    assert place_of(store.newest()[0]) == (150, 1)
    assert {f"{stem(100)}.h5", f"{stem(150)}.h5"} <= set(names(tmp_path))
    save(store, 250, 2)
    save(store, 260, 2)
    store.prune(2, None, "auto")
    assert names(tmp_path) == sorted([*files((250, 2), (260, 2), (350, 1)), f"{stem(400)}.h5"])


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


def test_one_that_is_written_while_the_folder_is_listed_is_no_damage(tmp_path, monkeypatch):
    """A listing of a local folder is no moment: it may show the manifest and not the .h5."""
    store = store_in(tmp_path)
    path = Path(save(store, 100))
    real, listings = storage.list_folder, []

    def early(uri: str) -> list[storage.Entry]:
        listings.append(uri)
        return [entry for entry in real(uri) if len(listings) > 1 or entry.name != path.name]

    monkeypatch.setattr(storage, "list_folder", early)
    found, skipped = store.newest()
    assert (place_of(found), skipped) == ((100, 1), [])
    assert len(listings) == 2


def test_a_writer_that_never_stops_does_not_hold_the_reader_for_ever(tmp_path, monkeypatch):
    save(store_in(tmp_path), 100)

    def gone(path: str) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(storage, "read_whole", gone)
    with pytest.raises(CheckpointError, match="changed as fast as it was looked at, 5 times"):
        store_in(tmp_path).newest()


@pytest.mark.parametrize("change", [{"run_id": None}, {"more": 1}])
def test_a_manifest_with_other_fields_is_told(tmp_path, change, monkeypatch):
    path = Path(save(store_in(tmp_path), 1)).with_suffix(".json")
    values = {**json.loads(path.read_text()), **change}
    values = {name: value for name, value in values.items() if value is not None}
    del values["digest"]
    monkeypatch.setattr("trainer.checkpoint_manifest._digest", lambda values: None)
    with pytest.raises(ManifestError, match="has other fields than a manifest: .*(run_id|more)"):
        load_manifest(json.dumps(values).encode())
