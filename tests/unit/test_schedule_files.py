"""Which pipelines a scheduler looks after, while their files come, change and go."""

import os
from pathlib import Path

import pytest

from configs.errors import UserError
from lockstep.pipeline_files import PipelineFiles


def write(path: Path, name: str, cron: str = "0 2 * * *", more: str = "") -> Path:
    path.write_text(f"name: {name}\nschedule: {{cron: '{cron}'{more}}}\n")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10_000_000))
    return path


def test_a_folder_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "a")
    (tmp_path / "job.yaml").write_text("name: job\n")
    (tmp_path / "notes.txt").write_text("{")
    files = PipelineFiles([], tmp_path)
    assert list(files.pipelines) == ["a"]
    write(tmp_path / "b.yml", "b", more=", jitter_s: 30, overlap: queue, timezone: Asia/Tokyo")
    write(tmp_path / "a.yaml", "a", "5 5 * * *")
    assert files.reload() == []
    assert list(files.pipelines) == ["a", "b"]
    assert files.pipelines["a"].schedule.cron.expression == "5 5 * * *"
    b = files.pipelines["b"].schedule
    assert (b.jitter_s, b.overlap, b.cron.timezone) == (30, "queue", "Asia/Tokyo")
    (tmp_path / "a.yaml").unlink()
    assert files.reload() == []
    assert list(files.pipelines) == ["b"]


def test_a_file_that_becomes_wrong_is_told_once_and_holds_what_it_held(tmp_path: Path) -> None:
    files = PipelineFiles([write(tmp_path / "a.yaml", "a")])
    write(tmp_path / "a.yaml", "a", "0 0 30 2 *")
    (problem,) = files.reload()
    assert "a.yaml: schedule: the cron expression '0 0 30 2 *' would never be due" in str(problem)
    assert files.reload() == []
    assert files.pipelines["a"].schedule.cron.expression == "0 2 * * *"
    write(tmp_path / "a.yaml", "a", "1 1 1 1 *")
    assert files.reload() == []
    assert files.pipelines["a"].schedule.cron.expression == "1 1 1 1 *"


@pytest.mark.parametrize("value", ["2013-13-45", "[" * 3000])
def test_values_that_yaml_cannot_read_do_not_end_the_scheduler(tmp_path: Path, value: str) -> None:
    files = PipelineFiles([], tmp_path)
    write(tmp_path / "a.yaml", "a")
    (tmp_path / "b.yaml").write_text(f"name: b\nsince: {value}\n")
    (problem,) = files.reload()
    assert str(problem).startswith(f"cannot read {tmp_path / 'b.yaml'}: ")
    assert list(files.pipelines) == ["a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\n", "has no section schedule"),
        ("schedule: {cron: '0 2 * * *'}\n", "name"),
        ("name: a/b\nschedule: {cron: '0 2 * * *'}\n", "name: received 'a/b'"),
        ("name: a\nschedule: {cron: '0 2 * * *', timezone: Europe/Zuerich}\n", "Europe/Zurich"),
        ("name: a\nschedule: {corn: '0 2 * * *'}\n", "cron"),
        ("name: a\nschedule: {cron: '0 2 * * *', overlap: wait}\n", "overlap"),
        ("name: [\n", "a.yaml"),
        ("name: 2013-13-45\nschedule: {cron: '0 2 * * *'}\n", "'2013-13-45' is no timestamp"),
    ],
)
def test_a_named_file_that_is_wrong_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        PipelineFiles([tmp_path / "a.yaml"])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="received no pipeline"):
        PipelineFiles([])
    with pytest.raises(UserError, match="which is no folder"):
        PipelineFiles([], tmp_path / "none")
    with pytest.raises(UserError, match=r"none\.yaml"):
        PipelineFiles([tmp_path / "none.yaml"])


def test_a_name_belongs_to_one_file(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "same")
    second = write(tmp_path / "b.yaml", "same")
    with pytest.raises(UserError, match="both have the name 'same'"):
        PipelineFiles([first, second])
    files = PipelineFiles([first])
    assert list(files.pipelines) == ["same"]
