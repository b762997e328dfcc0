"""`lockstep doctor`: each thing that can be wrong with a machine is found, with a remedy."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lockstep import doctor
from lockstep.cli import app
from lockstep.doctor import Finding

GIB = 2**30


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOCKSTEP_DATABASE", raising=False)
    for name in (*doctor._PROXIES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def found(name: str) -> Finding:
    return {finding.name: finding for finding in doctor.examine()}[name]


def test_a_sound_machine_has_no_fault() -> None:
    assert [finding for finding in doctor.examine() if finding.verdict == "fault"] == []


def disk(total: float, free: float) -> Callable[[object], SimpleNamespace]:
    usage = SimpleNamespace(total=int(total), free=int(free), used=int(total - free))
    return lambda _path: usage


def another_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "2.15.0" if name == "keras" else version(name)
    )


def a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _name: ["no-such-package>=1"])


def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _process: {0})


def a_limit_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = SimpleNamespace(exists=lambda: True, read_text=lambda: f"{GIB}\n")
    monkeypatch.setattr(doctor, "_CGROUP_MEMORY", limit)


def the_shm_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", disk(64 * 2**20, 64 * 2**20))


def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, 4096))


def a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", disk(1000 * GIB, 40 * GIB))


def a_long_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("f" * 60)
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))


def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")


def no_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError("not allowed")

    monkeypatch.setattr(doctor.socket, "create_server", refuse)


def a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")


def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_DATABASE", "sqlite:////proc/nowhere/metadata.db")


@pytest.mark.parametrize(
    ("break_it", "name", "verdict", "said"),
    [
        (another_keras, "packages", "fault", "keras 2.15.0 does not fit <3.16,>=3.15"),
        (a_missing_package, "packages", "fault", "no-such-package is not installed"),
        (one_core, "cores", "warning", "1"),
        (a_limit_on_memory, "memory", "warning", "1.0 GiB"),
        (the_shm_of_a_container, "shared memory", "warning", "64 MiB"),
        (few_files, "open files", "warning", "1,024 (at most 4,096)"),
        (a_full_disk, "temporary folder", "warning", "40.0 GiB free"),
        (no_folder, "temporary folder", "fault", "/nowhere"),
        (no_loopback, "loopback", "fault", "not allowed"),
        (a_proxy, "proxies", "warning", "http_proxy"),
        (no_database, "database", "fault", "/proc/nowhere"),
    ],
)
def test_what_is_wrong_is_found_and_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[pytest.MonkeyPatch], None],
    name: str,
    verdict: str,
    said: str,
) -> None:
    break_it(monkeypatch)
    finding = found(name)
    assert finding.verdict == verdict
    assert said in finding.found
    assert finding.remedy


def test_a_folder_too_long_for_rays_sockets_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_long_folder(monkeypatch, tmp_path)
    finding = found("temporary folder")
    assert finding.verdict == "fault"
    assert "RAY_TMPDIR" in finding.remedy


def test_a_proxy_that_spares_loopback_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    a_proxy(monkeypatch)
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert found("proxies").verdict == "ok"


def test_the_command_tells_all_and_ends_with_3_where_a_fault_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_loopback(monkeypatch)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 3
    told = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert told["loopback"]["verdict"] == "fault"
    assert told["database"]["verdict"] == "ok"
