"""Artifacts as the registry stores them: copied with every byte hashed, verified, fetched.

Owns what `manifest.json` means here: which files an artifact has, their digests, and the digest of
all. What is not in the manifest is no part of the artifact.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from registry.database import home
from registry.errors import ArtifactFailure, RegistryError
from registry.places import MANIFEST, Place, place_of

_CHUNK_BYTES = 4 * 2**20
_ABANDONED_S = 3600.0


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        digest: Of all files together.
        files: SHA-256 by relative name.
        lineage: Where the artifact comes from.
        text: The file itself.
    """

    digest: str
    files: dict[str, str]
    lineage: dict[str, Any]
    text: bytes

    @property
    def sha256(self) -> str:
        """Digest of the file itself."""
        return hashlib.sha256(self.text).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact folder, checked in itself.

    Raises:
        RegistryError: The folder is no artifact.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        inner = folder / "artifact" / MANIFEST
        remedy = f"Give {inner.parent}." if inner.exists() else "Give the `artifact` of a run."
        raise RegistryError(
            f"{folder} is no artifact: {MANIFEST} cannot be read ({error.strerror}). {remedy}"
        ) from None
    try:
        return parse_manifest(text)
    except ValueError as error:
        raise RegistryError(
            f"{folder / MANIFEST} {error}. Give an artifact as a run or an import wrote it."
        ) from None


def parse_manifest(text: bytes) -> Manifest:
    """The manifest in these bytes.

    Raises:
        ValueError: What is wrong with them, to follow the name of the file.
    """
    try:
        values = json.loads(text)
        digest, files = values["digest"], dict(values["files"])
        lineage = dict(values.get("lineage") or {})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("is not the manifest of an artifact") from None
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or name == MANIFEST:
            raise ValueError(f"names the file {name!r}, which is not inside the artifact")
    if _digest_of(files) != digest:
        raise ValueError("has a digest that does not fit the files it names")
    return Manifest(str(digest), files, lineage, text)


def store(folder: Path, manifest: Manifest, place: Place, beat: Callable[[], None]) -> int:
    """Copy an artifact folder to a new place; returns its size in bytes.

    `beat` is called between pieces of a few megabytes, and may raise to give up.

    Raises:
        RegistryError: A file is missing, or is not what the manifest says.
        ArtifactFailure: Storage failed.
    """
    size_bytes = len(manifest.text)
    try:
        for name, wanted in sorted(manifest.files.items()):
            source = _Hashed(folder / name, beat)
            place.write(name, source)
            if source.sha256 != wanted:
                raise RegistryError(
                    f"{folder / name} is not the file that {MANIFEST} describes: it was changed "
                    "after it was written. Register an artifact as it was written."
                )
            size_bytes += source.size_bytes
        place.write(MANIFEST, [manifest.text])
        place.commit()
    except FileNotFoundError as error:
        missing = next((name for name in manifest.files if not (folder / name).exists()), None)
        if missing is not None:
            raise RegistryError(
                f"{folder} is not whole: {missing} is missing. Register an artifact as it was "
                "written."
            ) from None
        raise ArtifactFailure(
            f"{place.name} was removed while it was written ({error}). Try again."
        ) from error
    return size_bytes


def damage(place: Place, digest: str, manifest_sha256: str) -> list[str]:
    """What is wrong with a stored artifact, every file read and hashed; empty where nothing is.

    Raises:
        ArtifactFailure: Storage failed; RegistryError: it refused.
    """
    try:
        with place.read(MANIFEST) as stream:
            text = stream.read()
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    try:
        manifest = parse_manifest(text)
    except ValueError as error:
        return [f"{MANIFEST} {error}"]
    found = []
    if manifest.digest != digest:
        found.append(f"digest {manifest.digest[:12]} is not {digest[:12]}, which was registered")
    elif manifest.sha256 != manifest_sha256:
        found.append(f"{MANIFEST} was changed")
    present = place.files()
    for name, wanted in sorted(manifest.files.items()):
        if name not in present:
            found.append(f"{name} is missing")
        elif _sha256(place, name) != wanted:  # one that has just gone counts as changed
            found.append(f"{name} was changed")
    strangers = present - set(manifest.files) - {MANIFEST}
    return found + [f"{name} was added" for name in sorted(strangers)]


def cached(place: Place, digest: str, manifest_sha256: str, cache: Path) -> Path:
    """A local folder with the artifact of a store, downloaded unless it is there and intact.

    Raises:
        ArtifactFailure: Storage failed, or what it holds is damaged.
    """
    target = cache / manifest_sha256  # which covers the digest
    local = place_of(str(target))
    if target.exists() and not damage(local, digest, manifest_sha256):
        return target
    _remove_abandoned(cache)
    download = place_of(str(cache / f"{manifest_sha256}-{secrets.token_hex(4)}"))
    try:
        with place.read(MANIFEST) as stream:
            manifest = parse_manifest(stream.read())
        for name in manifest.files:
            with place.read(name) as stream:
                download.write(name, _chunks(stream))
        download.write(MANIFEST, [manifest.text])
        download.commit()
        wrong = damage(download, digest, manifest_sha256)
        if wrong:
            raise ArtifactFailure(f"{place.name} is damaged: {'; '.join(wrong)}.")
        _exchange(Path(download.name), target)
    except (FileNotFoundError, ValueError) as error:
        raise ArtifactFailure(f"{place.name} is damaged: {error}.") from error
    finally:
        download.remove()
    return target


def _exchange(new: Path, target: Path) -> None:
    """Give a folder its name; what has it by then goes, whether damaged or of another process."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError:
        if not target.exists():
            raise
        # another process was as far at the same time, with the same bytes
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Downloads that ended with their process; those under way are younger."""
    limit = time.time() - _ABANDONED_S
    for folder in [*cache.glob(".*.partial"), *cache.glob(".*.old")]:
        if folder.stat().st_mtime < limit:
            shutil.rmtree(folder, ignore_errors=True)


class _Hashed:
    """The bytes of a local file, hashed and counted on their way."""

    def __init__(self, path: Path, beat: Callable[[], None]) -> None:
        self._path = path
        self._beat = beat
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        with self._opened() as stream:
            for chunk in _chunks(stream):
                self._beat()
                self._hash.update(chunk)
                self.size_bytes += len(chunk)
                yield chunk

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _opened(self) -> IO[bytes]:
        try:
            return open(self._path, "rb")
        except PermissionError as error:
            raise RegistryError(
                f"{self._path} cannot be read: {error.strerror}. Give this user the right to."
            ) from None


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _sha256(place: Place, file: str) -> str:
    digest = hashlib.sha256()
    try:
        with place.read(file) as stream:
            for chunk in _chunks(stream):
                digest.update(chunk)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def _digest_of(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def default_artifacts() -> str:
    """What LOCKSTEP_ARTIFACTS says, else `artifacts` below LOCKSTEP_HOME (~/.lockstep)."""
    return os.environ.get("LOCKSTEP_ARTIFACTS") or str(home() / "artifacts")
