"""Where a user's files may be: names, links, and what a name means when it is opened."""

import os

import pytest

from serving.errors import BatchError, LocationError
from serving.locations import check_location, file_state, find_files, opened, resolved_folder

STORE = ["s3://bucket/team", "gs://other"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("s3://bucket/team/x.parquet", "s3://bucket/team/x.parquet"),
        ("S3://bucket/team/a/*.csv", "s3://bucket/team/a/*.csv"),
        ("s3://bucket/team", "s3://bucket/team"),
        ("s3://bucket/team/", "s3://bucket/team"),
        ("gs://other/deep/x.csv", "gs://other/deep/x.csv"),
        ("s3://bucket/team/part-?/x.csv", "s3://bucket/team/part-?/x.csv"),
    ],
)
def test_uris_in_an_allowed_place_pass(name, found):
    assert check_location(name, STORE) == found


@pytest.mark.parametrize(
    "name",
    [
        "s3://bucket/teamwork/x",
        "s3://bucket/x",
        "s3://bucket",
        "s3://Bucket/team/x",
        "s3://other/team/x",
        "s3://bucket/team/../x",
        "s3://bucket/team/./x",
        "s3://bucket//team/x",
        "s3://bucket/t*/x",
        "s3://*/team/x",
        "s3://key:secret@bucket/team/x",
        "s3://bucket/team/x?endpoint_override=http://169.254.169.254",
        "s3:///team/x",
        "http://169.254.169.254/latest/meta-data",
        "https://bucket/team",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file:/etc/passwd",
        "ftp://bucket/team",
        "gopher://x/",
        "/etc/passwd",
        "team/x",
        "",
        "s3://bucket/team/\0x",
        "s3://bucket/team\\..\\x",
        "s3://bucket/team/" + "x" * 3_000,
    ],
)
def test_everything_else_is_refused_unseen(name):
    with pytest.raises(LocationError) as error:
        check_location(name, STORE)
    assert error.value.status == 403
    assert "secret" not in str(error.value)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "mine/x.csv").write_text("a\n1\n")
    (tmp_path / "theirs/y.csv").write_text("a\n2\n")
    return tmp_path


def test_links_are_followed_before_they_are_judged(home):
    allowed = [str(home / "mine")]
    (home / "mine/file.csv").symlink_to(home / "theirs/y.csv")
    (home / "mine/folder").symlink_to(home / "theirs")
    (home / "way").symlink_to(home / "mine")
    for bad in ("mine/file.csv", "mine/folder/y.csv", "mine/folder", "mine/folder/*.csv"):
        with pytest.raises(LocationError):
            check_location(str(home / bad), allowed)
    assert find_files([str(home / "way/x.csv")], allowed, (".csv",)) == [str(home / "way/x.csv")]
    with pytest.raises(LocationError):  # the folder is allowed, but not what is in it
        find_files([str(home / "mine/*.csv")], allowed, (".csv",))
    (home / "mine/file.csv").unlink()
    found = find_files([str(home / "mine")], allowed, (".csv",))
    assert found == [str(home / "mine/x.csv")]


def test_an_opened_file_is_judged_by_itself(home):
    allowed, path = [str(home / "mine")], home / "mine/x.csv"
    state = file_state(str(path))
    with opened(str(path), allowed, state) as file:
        assert file.read() == b"a\n1\n"
    path.write_text("a\n11\n")
    with pytest.raises(BatchError, match="changed"), opened(str(path), allowed, state):
        pass
    path.unlink()
    path.symlink_to(home / "theirs/y.csv")
    with pytest.raises(LocationError), opened(str(path), allowed):
        pass
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LocationError, match="no file"), opened(str(path), allowed):
        pass
    with opened(str(home / "theirs/y.csv"), None) as file:  # the service's own
        assert file.read() == b"a\n2\n"


def test_a_folder_to_write_to_is_where_its_links_lead(home):
    (home / "mine/out").symlink_to(home / "theirs")
    with pytest.raises(LocationError):
        resolved_folder(str(home / "mine/out/x"), [str(home / "mine")])
    new = resolved_folder(str(home / "mine/new/deep"), [str(home / "mine")])
    assert new == os.path.realpath(home / "mine/new/deep")
    with pytest.raises(LocationError):
        resolved_folder(str(home / "mine/*"), [str(home / "mine")])
