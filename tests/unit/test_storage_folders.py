"""Storage: what one folder holds, and whole files of pieces."""

import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.errors import DataError
from data_pipeline.storage import Entry
from tests.support.stores import MemoryStores


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStores:
    return MemoryStores(monkeypatch)


def test_one_folder_is_listed_hidden_names_too(tmp_path, memory):
    root = tmp_path / "bucket" / "run"
    for name, data in {"b.h5": b"12", ".a.partial": b"", "folder/deep.h5": b"123"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    memory.copy(tmp_path / "bucket", "s3://bucket")
    for uri in (str(root), f"{root}/", "s3://bucket/run"):
        entries = storage.list_folder(uri)
        assert [(entry.name, entry.is_file) for entry in entries] == [
            (".a.partial", True),
            ("b.h5", True),
            ("folder", False),
        ]
        assert entries[:2] == [Entry(".a.partial", 0, True), Entry("b.h5", 2, True)]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path, memory):
    memory.put("s3://bucket/other/x", b"")
    assert storage.list_folder(str(tmp_path / "none")) == []
    assert storage.list_folder("s3://bucket/none") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        storage.list_folder(str(tmp_path / "file"))


def test_a_link_to_nothing_is_no_file(tmp_path):
    os.symlink(tmp_path / "none", tmp_path / "link")
    assert storage.list_folder(str(tmp_path)) == []


def test_pieces_follow_each_other(tmp_path, memory):
    memory.put("s3://bucket/other", b"")
    array = np.arange(3, dtype="u1")
    for path in (str(tmp_path / "x"), "s3://bucket/x"):
        storage.write_whole(path, b"ab", array.data, b"", b"c")
        assert storage.read_whole(path) == b"ab\0\1\2c"
        storage.write_whole(path)
        assert storage.read_whole(path) == b""


def test_a_file_that_is_not_there_cannot_be_read(tmp_path, memory):
    memory.put("s3://bucket/other", b"")
    for path in (str(tmp_path / "x"), "s3://bucket/x"):
        with pytest.raises(FileNotFoundError):
            storage.read_whole(path)
    with pytest.raises(DataError, match="s4:// are not understood"):
        storage.read_whole("s4://bucket/x")


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(TypeError):
        storage.write_whole(str(tmp_path / "x"), b"new", "no bytes")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"
