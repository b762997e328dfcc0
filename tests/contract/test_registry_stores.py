"""Artifacts on an object store: stored, verified, fetched and deleted as in folders."""

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from data_pipeline.provenance import provenance
from data_pipeline.source import open_source
from registry import artifacts, places
from registry.database import Database
from registry.errors import ArtifactFailure, RegistryError
from registry.store import Registry
from tests.support.artifacts import FILES, write_artifact
from tests.support.stores import FailingStore, forget_stores, s3_server

ROOT = "s3://models/team/artifacts"
SECRET = "a-secret-that-nobody-prints"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        client = fs.S3FileSystem(
            access_key="writer",
            secret_key="writer",
            region="us-east-1",
            endpoint_override=address,
            allow_bucket_creation=True,
        )
        client.create_dir("models")
        yield address


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    forget_stores(monkeypatch)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "reader-of-models",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "LOCKSTEP_STORAGE_ATTEMPTS": "2",
        "LOCKSTEP_STORAGE_TIMEOUT_S": "1",
        "LOCKSTEP_HOME": str(tmp_path / "home"),
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'lockstep.db'}")
    yield database
    database.close()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact")


@pytest.fixture
def registry(server: str, environment: pytest.MonkeyPatch, database: Database) -> Registry:
    environment.setenv("AWS_ENDPOINT_URL_S3", server)
    return Registry(database, ROOT)


def write(uri: str, data: bytes) -> None:
    place = places.place_of(uri.rpartition("/")[0])
    place.write(uri.rpartition("/")[2], [data])


def test_an_artifact_on_a_store_is_an_artifact(
    registry: Registry, artifact: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    made = registry.register("m", artifact)
    other = registry.register("m", artifact)
    assert made.artifact.startswith(f"{ROOT}/m/")
    assert made.artifact != other.artifact
    assert places.place_of(made.artifact).files() == {*FILES, "manifest.json"}
    assert registry.verify(made) == []

    local = registry.fetch(made)
    assert local.is_relative_to(tmp_path / "home" / "cache")
    assert {p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()} == {
        *FILES,
        "manifest.json",
    }
    environment.setattr(places._Remote, "read", None)  # what is there is not asked for again
    assert registry.fetch(made) == local
    environment.undo()


def test_a_damaged_download_is_replaced_and_a_damaged_store_told(
    registry: Registry, artifact: Path
) -> None:
    made = registry.register("m", artifact)
    local = registry.fetch(made)
    (local / "model.keras").write_bytes(b"damaged")
    assert registry.fetch(made) == local
    assert (local / "model.keras").read_bytes() == FILES["model.keras"]
    assert sorted(p.name for p in local.parent.iterdir()) == [local.name]

    write(f"{made.artifact}/signature.json", b"[]")
    assert registry.verify(made) == ["signature.json was changed"]
    (local / "model.keras").write_bytes(b"damaged")
    with pytest.raises(ArtifactFailure, match=r"is damaged: signature\.json was changed"):
        registry.fetch(made)
    assert sorted(p.name for p in local.parent.iterdir()) == [local.name]
    write(f"{made.artifact}/manifest.json", b"[]")
    with pytest.raises(ArtifactFailure, match=r"is damaged: .*is not the manifest"):
        registry.fetch(made)


def test_deleting_removes_the_objects(registry: Registry, artifact: Path) -> None:
    made, kept = registry.register("m", artifact), registry.register("m", artifact)
    registry.delete("m", made.number)
    assert places.place_of(made.artifact).files() == set()
    assert registry.verify(kept) == []
    assert registry.verify(registry.version("m", made.number)) == ["it was deleted"]


def test_an_upload_that_fails_halfway_leaves_nothing(
    registry: Registry, artifact: Path, environment: pytest.MonkeyPatch
) -> None:
    (artifact / "saved_model/saved_model.pb").write_bytes(b"changed")
    with pytest.raises(RegistryError, match="changed after it was written"):
        registry.register("broken", artifact)
    assert places.place_of(f"{ROOT}/broken").files() == set()


def test_old_downloads_of_processes_that_died_go(
    registry: Registry, artifact: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "home" / "cache" / "artifacts"
    for name in (".x.partial", ".y.old"):
        (cache / name).mkdir(parents=True)
    made = registry.register("m", artifact)
    registry.fetch(made)
    assert (cache / ".x.partial").exists()
    environment.setattr(artifacts, "_ABANDONED_S", -1.0)
    registry.fetch(registry.register("n", write_artifact(tmp_path / "b", {"model.keras": b"b"})))
    assert not (cache / ".x.partial").exists()
    assert not (cache / ".y.old").exists()


def test_data_on_a_store_are_recorded_by_their_etag(
    registry: Registry, tmp_path: Path, server: str
) -> None:
    """Here for the sake of the server: what a version's lineage says of its data."""
    etags = []
    for value in (2.0, 3.0):
        data = tmp_path / "a.parquet"
        pq.write_table(pa.table({"a": [1.0, value]}), data)
        write("s3://models/rows/a.parquet", data.read_bytes())
        (record,) = provenance(open_source("train", "s3://models/rows", ["a"]).files)
        assert (record["rows"], record["size_bytes"]) == (2, data.stat().st_size)
        etags.append(record["etag"])
    assert all(re.fullmatch(r"[0-9a-f]{32}(-\d+)?", etag) for etag in etags)
    assert etags[0] != etags[1]


@pytest.mark.parametrize("status", [403, 500, pytest.param(None, marks=pytest.mark.long)])
def test_a_store_that_does_not_serve_is_told_without_secrets(
    status: int | None, environment: pytest.MonkeyPatch, database: Database, artifact: Path
) -> None:
    registry = Registry(database, ROOT)
    with FailingStore(status) as store:
        environment.setenv("AWS_ENDPOINT_URL_S3", store.address)
        expected = RegistryError if status == 403 else ArtifactFailure
        with pytest.raises(
            expected, match=r"^s3://models/team/artifacts/m/.*: the store"
        ) as caught:
            registry.register("m", artifact)
    assert SECRET not in str(caught.value)
    assert registry.models() == []


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("hdsf://models", r"with hdsf:// are.*Did you mean 'hdfs'"),
        (f"s3://key:{SECRET}@models/x", "holds credentials or options"),
        (f"s3://models/x?secret_key={SECRET}", "holds credentials or options"),
        ("s3:///x", "names no single bucket"),
    ],
)
def test_places_that_are_not_understood(root: str, message: str, database: Database) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        Registry(database, root)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCKSTEP_STORAGE_ATTEMPTS", "many"),
        ("LOCKSTEP_STORAGE_TIMEOUT_S", "0"),
        ("AWS_ENDPOINT_URL_S3", "store:9000"),
    ],
)
def test_an_environment_that_is_not_understood(
    name: str, value: str, environment: pytest.MonkeyPatch, database: Database, artifact: Path
) -> None:
    environment.setenv(name, value)
    with pytest.raises(RegistryError, match=name):
        Registry(database, ROOT).register("m", artifact)


def test_the_environment_says_where_artifacts_go(
    monkeypatch: pytest.MonkeyPatch, database: Database, artifact: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOCKSTEP_ARTIFACTS", raising=False)
    inside = Registry(database).register("m", artifact).artifact
    assert Path(inside).parent == tmp_path / "home" / "artifacts" / "m"
    monkeypatch.setenv("LOCKSTEP_ARTIFACTS", f"file://{tmp_path / 'elsewhere'}")
    there = Registry(database).register("m", artifact).artifact
    assert Path(there).parent == tmp_path / "elsewhere" / "m"
