"""A renderer for the checks, on a machine that may have none.

Uses kubectl or kustomize where there is one; else fetches Debian's package `kustomize` into
build/kustomize, without root and without touching the machine's own package lists.

    python -m tests.deploy.checks.renderer        # prints the command; fetches it if need be
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from configs.errors import UserError
from lockstep.kustomize import renderer

ROOT = Path(__file__).parents[3]
_FOLDER = ROOT / "build" / "kustomize"
_PROGRAM = _FOLDER / "root" / "usr" / "bin" / "kustomize"
_RELEASE = "trixie main"  # the release before has no such package
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_FETCH_S = 120.0


@functools.cache
def ensure_renderer() -> list[str]:
    """The command that renders a folder; fetched where none is installed.

    Raises:
        UserError: There is none, and none could be fetched.
    """
    try:
        return renderer()
    except UserError:
        if not _PROGRAM.exists():
            fetch()
        os.environ["LOCKSTEP_KUSTOMIZE"] = str(_PROGRAM)
        return renderer()


def fetch() -> None:
    """Fetch Debian's package and unpack it below build/.

    Raises:
        UserError: This is no Debian, or its mirror does not answer.
    """
    missing = [name for name in ("apt-get", "dpkg") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"the checks need kubectl or kustomize, and {' and '.join(missing)} to fetch one. "
            "Install kubectl or kustomize."
        )
    source = f"deb [signed-by={_KEYRING}] {mirror()} {_RELEASE}"
    partial = _FOLDER.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "root"):
        (partial / name).mkdir(parents=True)
    (partial / "sources.list").write_text(f"{source}\n")
    apt = [
        "apt-get",
        *("-o", f"Dir::Etc::sourcelist={partial / 'sources.list'}"),
        *("-o", "Dir::Etc::sourceparts=/dev/null"),
        *("-o", f"Dir::State::lists={partial / 'lists'}"),
        *("-o", f"Dir::Cache={partial / 'cache'}"),
        *("-o", "Acquire::Languages=none", "-o", "Acquire::http::Timeout=20"),
        *("-o", "APT::Sandbox::User="),
    ]
    _run([*apt, "update"], partial)
    _run([*apt, "download", "kustomize"], partial)
    package = next(iter(partial.glob("kustomize_*.deb")), None)
    if package is None:
        raise UserError(f"apt-get has left no package in {partial}. Install kubectl or kustomize.")
    _run(["dpkg", "-x", str(package), str(partial / "root")], partial)
    shutil.rmtree(_FOLDER, ignore_errors=True)
    partial.rename(_FOLDER)


def mirror() -> str:
    """The address that this machine has Debian's packages from.

    Raises:
        UserError: Its package lists name none.
    """
    # Known from the lists of sources alone, also where no package list was ever fetched.
    for address in _run(["apt-get", "indextargets", "--format", "$(REPO_URI)"], ROOT).split():
        if address.rstrip("/").endswith("/debian"):
            return address
    raise UserError(
        "apt-get has no mirror of Debian among its sources. Install kubectl or kustomize."
    )


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_FETCH_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not end within {_FETCH_S:g} s. Install kubectl or kustomize."
        ) from None
    if done.returncode:
        raise UserError(
            f"{command[0]} failed: {done.stderr.strip()[-300:]}. Install kubectl or kustomize."
        )
    return done.stdout


if __name__ == "__main__":
    try:
        print(" ".join(ensure_renderer()))
    except UserError as error:
        sys.exit(f"error: {error}")
