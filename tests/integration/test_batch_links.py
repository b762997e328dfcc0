"""Outputs where their users may write: what they put there leads nowhere else and tells nothing."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from serving.batch_output import PartFile, commit_file, file_digest
from serving.errors import BatchError, LocationError
from tests.integration.test_batch_routes import client_of
from tests.support.batches import Place, hashes, output, rows

SECRET = '{"parts": [], "errors": [], "is_complete": true, "root": "hash"}'


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path / "place")
    yield found
    found.close()


@pytest.fixture
def victim(tmp_path):
    """A folder of somebody else's, with a file; nothing of a job may change it."""
    folder = tmp_path / "victim"
    folder.mkdir()
    names = ["secret.json", "part-00000.parquet", "part-00000.1.parquet", "part-00001.1.parquet"]
    for name in names:
        (folder / name).write_text(SECRET)
    yield folder
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        names, SECRET
    )


def submit(place, **values):
    where = str(place.folder / "out/ada/mine")
    path = place.write(rows(64 * 4))
    return place.submit(input=path, output=where, shard_rows=64, **values)


def refused(call):
    with pytest.raises(BatchError) as error:
        call()
    assert error.value.status == 404


def swap(path, target):
    path.rename(path.with_name(f"{path.name}-before"))
    path.symlink_to(target)


def test_a_manifest_that_the_user_wrote_opens_no_other_file(place, victim):
    job = place.until(submit(place))
    folder = Path(job.folder)
    made = json.loads((folder / "manifest.json").read_text())
    away = os.path.relpath(victim / "secret.json", folder)
    (folder / "parts/link.parquet").symlink_to(victim / "secret.json")
    names = [away, str(victim / "secret.json"), "parts/link.parquet", "../../../../lockstep.db"]
    made["parts"] += [{"name": name, "rows": 1, "size_bytes": 1, "sha256": ""} for name in names]
    (folder / "manifest.json").write_text(json.dumps(made))
    for name in names:
        refused(lambda name=name: place.service.part(place.account, job.id, name))

    async def ask():
        async with client_of(place) as client:
            for name in names:
                answer = await client.get(f"/v1/batches/{job.id}/output/{name}")
                assert (answer.status_code, "hash" in answer.text) == (404, False)
            good = await client.get(f"/v1/batches/{job.id}/output/parts/part-00000.parquet")
            assert good.content == (folder / "parts/part-00000.parquet").read_bytes()

    asyncio.run(ask())


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_manifest_is_told(place, text):
    job = place.until(submit(place))
    Path(job.folder, "manifest.json").write_text(text)
    with pytest.raises(BatchError) as error:
        place.service.output(place.account, job.id)
    assert (error.value.status, error.value.code) == (409, "damaged_output")


def test_links_in_place_of_files_are_not_read(place, victim):
    job = place.until(submit(place))
    for name in ("manifest.json", "_SUCCESS", "parts/part-00001.parquet"):
        swap(Path(job.folder, name), victim / "secret.json")
        refused(lambda name=name: place.service.part(place.account, job.id, name))
    refused(lambda: place.service.output(place.account, job.id))
    swap(Path(job.folder, "parts"), victim)
    refused(lambda: place.service.part(place.account, job.id, "parts/part-00000.parquet"))
    os.mkfifo(Path(job.folder, "pipe"))
    Path(job.folder, "_SUCCESS").unlink()
    Path(job.folder, "pipe").rename(Path(job.folder, "_SUCCESS"))
    refused(lambda: place.service.part(place.account, job.id, "_SUCCESS"))


def test_links_among_concatenated_parts_are_not_read(place, victim):
    path = place.data / "in.ndjson"
    path.write_text('{"a": 1, "b": 2}\n' * 10)
    where = str(place.folder / "out/ada/mine")
    job = place.until(place.submit(input=str(path), output=where, output_format="input"))
    swap(Path(job.folder, "parts/part-00000.ndjson"), victim / "secret.json")
    found = []
    with pytest.raises(LocationError) as error:
        found.extend(place.service.files.content(place.account, job.output_file))
    assert (found, "hash" in str(error.value)) == ([], False)


@pytest.mark.parametrize("name", ["parts/.tmp", "parts", "errors", ""])
def test_folders_that_became_links_are_not_written_to(place, victim, name):
    job_name = submit(place)
    place.until(job_name, "in_progress")
    folder = Path(place.service.job(place.account, job_name).folder)
    swap(folder / name if name else folder, victim)
    job = place.until(job_name)
    assert job.status == "failed"
    if name:  # elsewhere, nothing of it is there to be removed
        place.service.delete_output(place.account, job_name)
        assert not folder.exists()


def test_a_folder_above_that_became_a_link_is_not_gone_into(place, victim):
    above = place.folder / "out/ada/mine"
    above.mkdir(parents=True)
    name = submit(place)
    swap(above, victim)
    job = place.until(name)
    assert (job.status, json.loads(job.problems)[0]["code"]) == ("failed", "output_refused")


def test_a_link_under_the_name_of_an_attempt_is_replaced(place, victim):
    name = submit(place)
    place.until(name, "in_progress")
    folder = Path(place.service.job(place.account, name).folder)
    for shard in (1, 2):
        place_of_attempt = folder / f"parts/.tmp/part-{shard:05d}.1.parquet"
        if not place_of_attempt.exists():
            place_of_attempt.symlink_to(victim / "secret.json")
    (folder / "parts/part-00003.parquet").symlink_to(victim / "secret.json")
    job = place.until(name)
    assert (job.status, output(job).num_rows) == ("completed", 256)
    assert not any((folder / part).is_symlink() for part in hashes(job))


def test_a_link_counts_for_no_part_after_a_crash(place, victim):
    job = place.until(submit(place))
    part = PartFile("parts/part-00000.parquet", 64, 1, "")
    assert file_digest(job.folder, part.name) is not None
    swap(Path(job.folder, part.name), victim / "part-00000.parquet")
    assert file_digest(job.folder, part.name) is None
    with pytest.raises(FileNotFoundError):
        commit_file(job.folder, part, 1)


@pytest.mark.parametrize("name", ["parts", "errors", "parts/sub"])
def test_removing_an_output_leaves_what_links_lead_to(place, victim, name):
    job = place.until(submit(place))
    path = Path(job.folder, name)
    if path.exists():
        path.rename(path.with_name("before"))
    path.symlink_to(victim)
    place.service.delete_output(place.account, job.id)
    assert not Path(job.folder).exists()
