"""Where the checks have their renderer from."""

import urllib.request

import pytest

from configs.errors import UserError
from lockstep.kustomize import render
from tests.deploy.checks import renderer
from tests.deploy.checks.references import DEPLOY


def test_what_is_installed_is_used(monkeypatch):
    monkeypatch.setattr(renderer, "fetch", lambda: pytest.fail("fetched"))
    monkeypatch.setenv("LOCKSTEP_KUSTOMIZE", "/opt/kustomize")
    assert renderer.ensure_renderer.__wrapped__() == ["/opt/kustomize", "build"]


def test_a_machine_that_cannot_fetch_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(renderer.shutil, "which", lambda name, path=None: None)
    with pytest.raises(UserError, match="Install kubectl or kustomize"):
        renderer.fetch()


def test_a_fetch_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(renderer, "_FETCH_S", 0.2)
    with pytest.raises(UserError, match=r"did not end within 0\.2 s"):
        renderer._run(["sleep", "60"], tmp_path)


def has_mirror() -> bool:
    try:
        address = f"{renderer.mirror().rstrip('/')}/dists/trixie/Release"
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (OSError, UserError):  # a mirror that does not answer is an OSError too
        return False


def test_a_machine_without_a_mirror_is_told(monkeypatch):
    monkeypatch.setattr(renderer, "_run", lambda command, folder: "http://example.org/ubuntu/")
    with pytest.raises(UserError, match="no mirror of Debian"):
        renderer.mirror()


@pytest.mark.long
@pytest.mark.skipif(renderer.shutil.which("apt-get") is None, reason="needs Debian's apt-get")
def test_debians_package_renders_the_same(monkeypatch, tmp_path, renders):
    if not has_mirror():
        pytest.skip("needs Debian's mirror")
    folder = tmp_path / "kustomize"
    monkeypatch.setattr(renderer, "_FOLDER", folder)
    renderer.fetch()
    program = folder / "root/usr/bin/kustomize"
    monkeypatch.setenv("LOCKSTEP_KUSTOMIZE", str(program))
    assert render(DEPLOY / "overlays/prod") == renders("prod")
