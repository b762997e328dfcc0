"""Checkpoints: what comes back, what a damaged one does, and what a failed write leaves behind."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainer import checkpoint
from trainer.checkpoint import read_checkpoint, write_checkpoint
from trainer.errors import CheckpointError

ARRAYS: dict[str, Any] = {
    "model/dense/kernel": np.arange(12, dtype="f4").reshape(3, 4) / 7,
    "model/dense/bias": np.zeros(0, "f4"),
    "optimizer/iteration": np.asarray(41, "i8"),
    "ranks/seeds": np.asarray([[1, 2], [3, 2**32 - 1]], "u4"),
    "ranks/flags": np.asarray([True, False]),
    "model/strided": np.arange(10, dtype="f8")[::3],
}
META = {"step": 41, "history": {"loss": [0.5, 0.25]}, "none": None, "name": "größer"}


def write(folder: Path, step: int, value: float = 0.0) -> Path:
    arrays = {**ARRAYS, "model/value": np.full(50, value, "f4")}
    return write_checkpoint(folder, f"step-{step:010d}", arrays, {**META, "step": step})


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def test_arrays_and_meta_come_back_bit_for_bit(tmp_path):
    path = write_checkpoint(tmp_path / "new" / "folder", "step-0000000041", ARRAYS, META)
    assert path == tmp_path / "new" / "folder" / "step-0000000041.h5"
    arrays, meta = read_checkpoint(path)
    assert_same(arrays, ARRAYS)
    assert meta == META
    assert names(path.parent) == ["step-0000000041.h5"]


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text("abc/", min_size=1).filter(lambda name: not {"", "."} & set(name.split("/"))),
        hnp.arrays(
            st.sampled_from(["f2", "f4", "f8", "i8", "u4", "?"]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        ),
        max_size=3,
    ).filter(lambda arrays: not any(f"{a}/" in b for a in arrays for b in arrays))
)
def test_any_arrays_come_back(tmp_path_factory, arrays):
    path = write_checkpoint(tmp_path_factory.mktemp("any"), "step-1", arrays, {})
    assert_same(read_checkpoint(path)[0], arrays)


def test_arrays_are_put_into_the_file_and_looked_at_in_it_without_a_copy(tmp_path):
    array = np.arange(2000, dtype="f4")
    odd = {f"odd/{size}": np.ones(size, "?") for size in (3, 1, 4097)}
    packed = checkpoint.pack({**odd, "a": array, "scalar": np.asarray(2.0), "b": array[:5]}, META)
    shared = [np.shares_memory(array, np.frombuffer(piece, "u1")) for piece in packed.pieces]
    assert sum(shared) == 2
    data = b"".join(packed.pieces)
    assert packed.size_bytes == len(data)
    assert packed.sha256 == hashlib.sha256(data[512:]).hexdigest()
    arrays, meta, sha256 = checkpoint.unpack(data)
    assert (meta, sha256) == (META, packed.sha256)
    assert np.shares_memory(arrays["a"], np.frombuffer(data, "u1"))
    assert not arrays["a"].flags.writeable
    assert all(found.flags.aligned for found in arrays.values())


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """It was written by HDF5 alone, which aligns nothing."""
    path = tmp_path / "step-0000000001.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        for key, array in ARRAYS.items():
            file.create_dataset(key, data=array)
        file.attrs["meta"] = '{"step": 1}'
    data = path.read_bytes()[512:]
    path.write_bytes(checkpoint._header(hashlib.sha256(data).hexdigest()) + data)
    arrays, meta = read_checkpoint(path)
    assert_same(arrays, ARRAYS)
    assert meta == {"step": 1}


def test_long_meta_comes_back(tmp_path):
    meta = {"history": {"loss": [float(epoch) for epoch in range(20_000)]}}
    path = write_checkpoint(tmp_path, "step-1", {}, meta)
    assert read_checkpoint(path) == ({}, meta)


def test_others_can_open_it_with_h5py_alone(tmp_path):
    path = write(tmp_path, 3)
    with h5py.File(path) as file:
        assert file["model/dense/kernel"].shape == (3, 4)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def with_wrong_digest(content: bytes) -> bytes:
    place = content.index(b"follows: ") + len(b"follows: ")
    return content[:place] + (b"0" * 64) + content[place + 64 :]


DAMAGES = {
    "truncated": truncated,
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "one bit flipped": flipped,
    "wrong digest": with_wrong_digest,
    "empty": lambda content: b"",
    "not HDF5": lambda content: b"PK\3\4 something else" * 100,
    "no digest": lambda content: content[512:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_is_told(tmp_path, damage):
    damaged = write(tmp_path, 200)
    damaged.write_bytes(damage(damaged.read_bytes()))
    reason = f"{damaged} is damaged: its digest does not fit its content."
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(damaged)
    assert str(error.value) == reason
    assert error.value.is_retryable


def test_flipped_bits_anywhere_are_found_before_hdf5_sees_them(tmp_path, monkeypatch):
    """HDF5's own library crashes the process on some of them."""
    path = write(tmp_path, 1)
    content = path.read_bytes()
    monkeypatch.setattr(checkpoint.h5py, "File", lambda *_: pytest.fail("HDF5 saw a damaged file"))
    chance = random.Random(0)
    for place in chance.sample(range(len(content)), 300):
        bit = 1 << chance.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged"):
            read_checkpoint(path)


def test_what_is_sealed_but_no_checkpoint_is_not_readable(tmp_path):
    path = tmp_path / "step-1.h5"
    content = b"no HDF5 here"
    path.write_bytes(checkpoint._header(hashlib.sha256(content).hexdigest()) + content)
    with pytest.raises(CheckpointError, match=r"step-1\.h5 cannot be read: .*signature not found"):
        read_checkpoint(path)


def test_a_missing_one_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.h5 cannot be read: .*No such file"):
        read_checkpoint(tmp_path / "none.h5")


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_one_and_no_other_trace(tmp_path, monkeypatch, broken):
    path = write(tmp_path, 7, value=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, no_space)
        with pytest.raises(CheckpointError) as error:
            write(tmp_path, 7, value=2.0)
    assert str(error.value) == (
        f"cannot write {path}: [Errno 28] No space left on device. Free the storage."
    )
    assert names(tmp_path) == [path.name]
    assert read_checkpoint(path)[0]["model/value"][0] == 1.0


def test_a_write_that_dies_in_hdf5_leaves_no_trace(tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Can't decrement id ref count (file write failed)")

    monkeypatch.setattr(h5py.File, "create_dataset", fail)
    with pytest.raises(CheckpointError, match="cannot write .*file write failed.* Free the"):
        write(tmp_path, 7)
    assert names(tmp_path) == []


def test_an_interrupted_write_leaves_no_trace(tmp_path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 7)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write .*Free the storage"):
        write(tmp_path / "file" / "checkpoints", 1)


def test_the_name_appears_only_when_the_content_is_synced(tmp_path, monkeypatch):
    seen: list[tuple[str, list[str]]] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def watched(*arguments: Any, name: str = name, real: Any = real) -> None:
            seen.append((name, [entry for entry in names(tmp_path) if entry[0] != "."]))
            real(*arguments)

        monkeypatch.setattr(os, name, watched)
    write(tmp_path, 7)
    assert seen == [("fsync", []), ("replace", []), ("fsync", ["step-0000000007.h5"])]


FULL_STORAGE = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from trainer.checkpoint import write_checkpoint
from trainer.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
for limit in (0, 600, 5_000, 300_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_checkpoint(folder, "step-1", {"a": np.zeros(50_000), "b": np.ones(50_000)}, {})
    except CheckpointError as error:
        print(limit, "File too large" in str(error) or "Errno 27" in str(error))
    print(sorted(path.name for path in folder.iterdir()))
"""


def test_storage_that_is_really_full_is_told_and_leaves_no_trace(tmp_path):
    """A limit on file sizes fails in the same calls as a full disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_STORAGE, str(tmp_path)], capture_output=True, text=True
    )
    expected = "".join(f"{limit} True\n[]\n" for limit in (0, 600, 5_000, 300_000))
    assert done.stdout == expected, done.stderr
