"""What is sent of a job, what its paths mean there, and what is told before."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.load import load_job
from lockstep import remote
from lockstep.submit import SubmitOptions, check, packing, sent_files
from tests.support.jobs import make_job


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with code, data and what must not be sent."""
    for name, text in {
        "model.py": "import blocks\nfrom parts import tail\nimport numpy, os\n",
        "blocks.py": "from parts.deep import norm\n",
        "parts/__init__.py": "",
        "parts/tail.py": "from . import deep\n",
        "parts/deep/__init__.py": "from .inner import x\n",
        "parts/deep/norm.py": "",
        "parts/deep/inner.py": "x = 1\n",
        "parts/unused.py": "",
        "other.py": "",
        ".env": "TOKEN=hunter22",
        "notes.txt": "",
        "data/train/0.parquet": "rows",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(**changes: Any) -> Any:
    built = make_job(Path("data"), Path("runs"), model={"builder": "model.py:build"}, **changes)
    return load_job(built)


def sent(loaded: Any, **options: Any) -> set[str]:
    with packing(loaded, SubmitOptions(**options)) as packed:
        return set(sent_files(packed))


def test_code_and_what_it_imports_is_sent_and_nothing_else(here):
    assert sent(job()) == {
        *("job.yaml", "lockstep-run.json", "model.py", "blocks.py"),
        *("parts/__init__.py", "parts/tail.py"),
        *("parts/deep/__init__.py", "parts/deep/norm.py", "parts/deep/inner.py"),
    }


def test_code_is_found_wherever_the_job_names_it(here):
    (here / "mine.py").write_text("")
    loaded = load_job(
        make_job(
            Path("data"),
            Path("runs"),
            model__layers=[{"mine.py:Layer": {"units": 1}}, {"Dense": {"units": 1}}],
            train__callbacks=["other.py:Stop"],
            compile__loss="parts.unused:loss",
        )
    )
    assert sent(loaded) == {
        *("job.yaml", "lockstep-run.json", "mine.py", "other.py"),
        *("parts/__init__.py", "parts/unused.py"),
    }


def test_code_from_elsewhere_keeps_its_neighbours(here, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.py").write_text("import near\nimport blocks\n")
    (elsewhere / "near.py").write_text("")
    loaded = job(model__builder=f"{elsewhere}/far.py:build")
    with packing(loaded, SubmitOptions()) as packed:
        names = set(sent_files(packed))
        assert {"elsewhere0/far.py", "elsewhere0/near.py", "blocks.py"} <= names
        there = load_job(packed.folder / "job.yaml")
        assert there.model.builder == "elsewhere0/far.py:build"


def test_lockstep_itself_is_not_sent(here):
    (here / "configs").mkdir()
    (here / "configs" / "__init__.py").write_text("")
    (here / "configs" / "load.py").write_text("")
    (here / "model.py").write_text("from configs.load import load_job\n")
    assert sent(job()) == {"job.yaml", "lockstep-run.json", "model.py"}


def test_a_text_with_a_colon_is_no_code(here):
    loaded = job(model__arguments={"time": "12:30", "url": "s3://bucket/x:y"})
    assert "model.py" in sent(loaded)


def test_relative_paths_are_this_folders(here):
    with packing(job(), SubmitOptions(run_id="r")) as packed:
        there = load_job(packed.folder / "job.yaml")
        assert there.data.train == str(here / "data/train")
        assert there.runs_dir == str(here / "runs")
        assert packed.run_folder == str(here / "runs/small/r")
        assert packed.inputs["data.train"] == [str(here / "data/train")]
        assert packed.outputs == {"runs_dir": str(here / "runs")}
        assert there.model.builder == "model.py:build"


def test_a_registered_model_is_no_path(here):
    def packed_with(file: str) -> Any:
        return packing(
            load_job(make_job(Path("data"), Path("runs"), model={"file": file})), SubmitOptions()
        )

    with packed_with("flights@champion") as packed:
        assert load_job(packed.folder / "job.yaml").model.file == "flights@champion"
        assert "model.file" not in packed.inputs
    with packed_with("old/model.keras") as packed:
        assert packed.inputs["model.file"] == [str(here / "old/model.keras")]


def test_relative_paths_may_start_elsewhere_there(here):
    loaded = job(data__train=["a", "/abs/b", "s3://bucket/c"], checkpoint__uri="s3://bucket/x")
    with packing(loaded, SubmitOptions(cluster_dir="/shared/project")) as packed:
        there = load_job(packed.folder / "job.yaml")
        assert there.data.train == ["/shared/project/a", "/abs/b", "s3://bucket/c"]
        assert there.runs_dir == "/shared/project/runs"
        assert there.checkpoint.uri == "s3://bucket/x"
        assert packed.inputs["data.train"] == ["/shared/project/a", "/abs/b"]


def test_a_set_value_travels(here):
    loaded = load_job(job(), ["train.epochs=7", "cluster.workers=3"])
    with packing(loaded, SubmitOptions()) as packed:
        assert load_job(packed.folder / "job.yaml").train.epochs == 7
        assert packed.shape.workers == 3
        assert packed.versions["ray"] is not None


def test_secrets_are_named_only(here, monkeypatch):
    monkeypatch.setenv("TOKEN", "hunter22")
    with packing(job(), SubmitOptions(secrets=["TOKEN"])) as packed:
        content = b"".join(path.read_bytes() for path in packed.folder.rglob("*") if path.is_file())
        assert b"TOKEN" in content
        assert b"hunter22" not in content
        assert packed.secrets == {"TOKEN": "hunter22"}
        assert "hunter22" not in repr(packed)


def test_a_secret_in_the_code_is_refused(here, monkeypatch):
    monkeypatch.setenv("TOKEN", "hunter22")
    (here / "blocks.py").write_text("password = 'hunter22'\n")
    with pytest.raises(UserError, match="the value of TOKEN stands in blocks.py"):
        sent(job(), secrets=["TOKEN"])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("-----BEGIN PRIVATE KEY-----", {}, "model.py holds a private key"),
        ("def (", {}, "model.py:1: "),
        ("", {"secrets": ["NOT_SET_HERE"]}, "--env received NOT_SET_HERE, not set here"),
        ("", {"run_id": "../x"}, "--run-id received '../x'"),
    ],
)
def test_what_cannot_be_sent_is_told(here, text, options, message):
    (here / "model.py").write_text(f"# {text}" if "KEY" in text else text)
    with pytest.raises(UserError, match=message):
        sent(job(), **options)


def test_a_missing_file_of_code_is_told(here):
    with pytest.raises(UserError, match="there is no file mode.py"):
        sent(job(model__builder="mode.py:build"))


def seen(packed: Any, **changes: Any) -> dict[str, Any]:
    node = {"address": "head", "versions": dict(packed.versions), "missing": [], "unwritable": []}
    return {"nodes": [{**node, **changes}], "silent": []}


def test_a_cluster_that_has_everything_is_content(here):
    with packing(job(), SubmitOptions()) as packed:
        assert check(packed, seen(packed)) == []


def test_what_only_this_machine_has_is_told(here):
    with packing(job(), SubmitOptions()) as packed:
        path = str(here / "data/train")
        with pytest.raises(UserError, match=f"data.train: {path} exists only on this machine"):
            check(packed, seen(packed, missing=[["data.train", path]]))
        with pytest.raises(UserError, match="runs_dir: /x cannot be made on the head"):
            check(packed, seen(packed, unwritable=[["runs_dir", "/x"]]))


def test_versions_that_differ_are_told(here):
    with packing(job(), SubmitOptions()) as packed:
        other = seen(packed, versions={**packed.versions, "keras": "3.14.0", "python": "3.12"})
        with pytest.raises(UserError, match=r"keras 3\.\S+ here, 3.14.0 on the head"):
            check(packed, other)
        assert len(check(packed, other, is_any_version=True)) == 2


def test_a_run_that_was_started_is_resumed_and_one_that_is_done_is_not_run(tmp_path):
    assert "--resume" not in remote.arguments("r", tmp_path)
    (tmp_path / "job.yaml").write_text("")
    assert "--resume" in remote.arguments("r", tmp_path)
    assert not remote.is_done(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    assert not remote.is_done(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"status": "done"}))
    assert remote.is_done(tmp_path)
    (tmp_path / "job.yaml").write_text("export: {register: flights}")
    assert not remote.is_done(tmp_path)  # trained, and not registered yet
    (tmp_path / "summary.json").write_text(json.dumps({"status": "done", "version": "flights/1"}))
    assert remote.is_done(tmp_path)


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """An attempt of a submission on the cluster: its exit status, and whether it trained."""
    trained: list[str] = []

    def begin(submission: str, ends_with: int, sent_with: Any = None) -> tuple[Any, bool]:
        place = tmp_path / "sent"
        place.mkdir(exist_ok=True)
        manifest = {"run_id": "r", "run_folder": str(tmp_path / "run"), "secrets": []}
        manifest |= {"submission": submission, **({"versions": sent_with} if sent_with else {})}
        (place / "lockstep-run.json").write_text(json.dumps(manifest))
        monkeypatch.chdir(place)
        trained.clear()

        def train() -> None:
            trained.append("trained")
            if ends_with:
                raise SystemExit(ends_with)

        monkeypatch.setattr("lockstep.cli.main", train)
        monkeypatch.setattr("os.environ", dict(os.environ))
        monkeypatch.setattr("sys.argv", ["remote"])
        try:
            remote.main()
        except SystemExit as end:
            return end.code, bool(trained)
        return 0, bool(trained)

    return begin


@pytest.mark.parametrize("status", [2, 3])
def test_what_another_attempt_would_not_mend_is_not_tried_again(attempt, capsys, status):
    assert attempt("one", status) == (status, True)
    assert attempt("one", 0) == (status, False)
    assert f"r ended with status {status} in an earlier attempt" in capsys.readouterr().err
    assert attempt("two", 0) == (0, True)  # a new submission is tried


@pytest.mark.parametrize("status", [1, 130, -9])
def test_what_another_attempt_may_mend_is_tried_again(attempt, status):
    assert attempt("one", status) == (status, True)
    assert attempt("one", 0) == (0, True)


def test_the_queue_counts_attempts_itself(attempt, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_QUEUED", "1")
    assert attempt("one", 3) == (3, True)
    assert attempt("one", 0) == (0, True)


def test_versions_are_compared_where_the_run_is(attempt, capsys):
    from cluster.look import versions

    assert attempt("one", 0, versions()) == (0, True)
    assert attempt("two", 0, {**versions(), "keras": "3.0.0"}) == (2, False)
    assert "keras 3.0.0 where it was submitted" in capsys.readouterr().err
    assert attempt("two", 0, versions()) == (2, False)


@pytest.mark.parametrize(
    ("options", "has_versions", "has_submission"),
    [
        ({}, True, True),
        ({"is_any_version": True}, False, True),
        ({"is_reproducible": True}, False, False),
    ],
)
def test_versions_travel_unless_any_will_do(here, options, has_versions, has_submission):
    with packing(job(), SubmitOptions("r", **options)) as packed:
        manifest = json.loads((packed.folder / "lockstep-run.json").read_text())
    assert (("versions" in manifest), ("submission" in manifest)) == (has_versions, has_submission)


def test_what_was_sent_is_kept_with_the_run(tmp_path):
    sent, code = tmp_path / "ray", tmp_path / "run" / "code"
    (sent / "parts").mkdir(parents=True)
    (sent / "model.py").write_text("new")
    (sent / "parts" / "x.py").write_text("x")
    code.mkdir(parents=True)
    (code / "model.py").write_text("old")
    environment = {
        "PYTHONPATH": f"{sent}:/lockstep",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"working_dir": "x"}, "metadata": {}}',
    }
    changes = remote.settle(sent, code, environment)
    assert changes["PYTHONPATH"] == f"{code}:/lockstep"
    assert json.loads(changes["RAY_JOB_CONFIG_JSON_ENV_VAR"]) == {"runtime_env": {}, "metadata": {}}
    assert (code / "model.py").read_text() == "new"
    assert sorted(path.name for path in code.rglob("*")) == ["model.py", "parts", "x.py"]


def test_what_a_volume_of_kubernetes_shows_is_kept_too(tmp_path):
    """A kubelet links each first part of a name through `..data`, to a folder that has a date."""
    dated, code = tmp_path / "sent" / "..2026_01_01_00_00_00.1", tmp_path / "code"
    for name in ("job.yaml", "models/deep/net.py", "elsewhere0/far.py"):
        (dated / name).parent.mkdir(parents=True, exist_ok=True)
        (dated / name).write_text(name)
    (tmp_path / "sent" / "..data").symlink_to(dated.name)
    for first in ("job.yaml", "models", "elsewhere0"):
        (tmp_path / "sent" / first).symlink_to(f"..data/{first}")
    remote.settle(tmp_path / "sent", code, {})
    kept = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}
    assert kept == {"job.yaml", "models/deep/net.py", "elsewhere0/far.py"}
    assert not [path for path in code.rglob("*") if path.is_symlink()]


def test_secrets_are_handed_on_to_the_processes_of_a_run(monkeypatch):
    from cluster.secret_keeping import FORWARDED, forwarded

    assert forwarded() == {}
    monkeypatch.setenv("TOKEN", "hunter22")
    monkeypatch.setenv(FORWARDED, "TOKEN,NOT_SET_HERE")
    assert forwarded() == {"TOKEN": "hunter22"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit", "JOB", "--priority", "1"], "--priority has no effect without --queue"),
        (["submit", "JOB"], "no cluster is named. Give --address"),
        (
            ["submit", "JOB", "--address", "http://x", "--worker-memory", "8Gi"],
            "--worker-memory has",
        ),
        (
            ["submit", "JOB", "--address", "http://x", "--priority-class", "a"],
            "--priority-class has",
        ),
        (["submit", "JOB", "--address", "http://x", "--kubernetes"], "one of them is allowed"),
        (["submit", "JOB", "--kubernetes", "--cluster-dir", "/x"], "--cluster-dir has no effect"),
        (["jobs", "list"], "no cluster is named. Give --address"),
        (["submit", "nothing.yaml", "--address", "http://x"], "no job file at nothing.yaml"),
    ],
)
def test_commands_tell_mistakes(here, monkeypatch, capsys, words, message):
    from lockstep import cli

    monkeypatch.delenv("LOCKSTEP_ADDRESS", raising=False)
    from configs.load import dump_job

    (here / "job.yaml").write_text(dump_job(job()))
    monkeypatch.setattr("sys.argv", ["lockstep", *(w.replace("JOB", "job.yaml") for w in words)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 2
    assert message in capsys.readouterr().err
