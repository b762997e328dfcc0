"""From a job here to what travels: the job file, the code that it names, and nothing else.

Owns what is sent (never data, never secrets), what paths mean on the other side, and what is told
before anything is submitted: versions that differ, paths that are not there.
"""

import ast
import json
import os
import re
import secrets as randomness
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.look import versions
from cluster.room import Shape, Worker
from cluster.submit import Packed
from configs.errors import UserError
from configs.load import dump_job, load_job
from configs.schema import Job
from lockstep.models import names_version

MANIFEST = "lockstep-run.json"
JOB_FILE = "job.yaml"
VERSIONS, SUBMISSION = "versions", "submission"
"""Keys of the manifest that do not belong to the job: who sent it with what, and which time."""
ENTRYPOINT = "exec python -P -m lockstep.remote"

_OWN = ("lockstep", "configs", "data_pipeline", "cluster", "registry", "trainer", "serving")
_MOST_BYTES = 50 * 2**20
_SHORTEST_SECRET = 6
_CODE = re.compile(r"(?P<place>[^:]+):(?P<attribute>[A-Za-z_]\w*)")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class SubmitOptions:
    """How a job is sent, apart from what it is.

    Attributes:
        run_id: Names the run; None for a new one.
        cluster_dir: What relative paths of the job are relative to, on the cluster; None: this
            folder, by its absolute path.
        secrets: Names of environment variables that the run needs and nobody else may see.
        is_any_version: Whether it runs although versions there differ from those here.
        is_reproducible: Whether the same job is sent as the same bytes, whoever sends it and when:
            for manifests that are kept. The image then decides about versions.
    """

    run_id: str | None = None
    cluster_dir: str | None = None
    secrets: Sequence[str] = ()
    is_any_version: bool = False
    is_reproducible: bool = False


@contextmanager
def packing(job: Job, options: SubmitOptions) -> Iterator[Packed]:
    """The job as it travels, in a folder that lasts as long as the `with` block.

    Raises:
        UserError: Code that the job names is not there, a secret is not set or would be sent, or
            what would be sent is too large.
    """
    run_id = options.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{randomness.token_hex(2)}"
    if not _RUN_ID.fullmatch(run_id):
        raise UserError(
            f"--run-id received {run_id!r}; letters, digits, '.', '_' and '-' are allowed, and a "
            "letter or digit first. Choose another name."
        )
    hidden = _secrets(options.secrets)
    folder = Path(tempfile.mkdtemp(prefix="lockstep-submit-"))
    try:
        yield _pack(job, run_id, options, hidden, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sent_files(packed: Packed) -> dict[str, int]:
    """What is sent: bytes by name."""
    return {
        path.relative_to(packed.folder).as_posix(): path.stat().st_size
        for path in sorted(packed.folder.rglob("*"))
        if path.is_file()
    }


def check(packed: Packed, seen: dict[str, Any], is_any_version: bool = False) -> list[str]:
    """Compare what a run needs with what the cluster has (`RayJobs.look`); returns warnings.

    Raises:
        UserError: Paths are not there, folders cannot be made, or versions differ and may not.
    """
    problems, differing = [], []
    for node in seen["nodes"]:
        place = "the head" if node["address"] == "head" else f"node {node['address']}"
        for name, path in node["missing"]:
            where = "exists only on this machine" if Path(path).exists() else "is not there"
            problems.append(f"{name}: {path} {where}; {place} of the cluster has none")
        for name, path in node["unwritable"]:
            problems.append(f"{name}: {path} cannot be made on {place}")
        for package, here in packed.versions.items():
            there = node["versions"].get(package)
            if there != here:
                differing.append(f"{package} {here or 'none'} here, {there or 'none'} on {place}")
    if problems:
        raise UserError(
            f"{'; '.join(_few(problems))}. Name paths that all nodes of the cluster see, in the "
            "job or with --set, or with --cluster-dir the folder there for relative paths."
        )
    if differing and not is_any_version:
        raise UserError(
            f"versions differ: {'; '.join(_few(differing))}; the same ones are needed for the same "
            "numbers. Install the cluster's here, or submit with --any-version."
        )
    silent = [
        f"no answer from node {address}; Lockstep has to be there." for address in seen["silent"]
    ]
    return [f"versions differ: {text}." for text in _few(differing)] + silent


def _few(texts: Iterable[str]) -> list[str]:
    unique = list(dict.fromkeys(texts))
    return unique if len(unique) <= 6 else [*unique[:6], f"and {len(unique) - 6} more"]


def _secrets(names: Sequence[str]) -> dict[str, str]:
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"--env received {', '.join(missing)}, not set here; names of environment variables "
            "that have a value are allowed. Set them, and leave the value out of the command."
        )
    return {name: os.environ[name] for name in names}


def _pack(
    job: Job, run_id: str, options: SubmitOptions, hidden: dict[str, str], folder: Path
) -> Packed:
    code = _Code(Path.cwd())
    values = _renamed(job.model_dump(), code.place)
    there = options.cluster_dir or str(Path.cwd())
    inputs, outputs = _move_paths(values, there)
    moved = load_job(values)
    run_folder = f"{moved.runs_dir}/{job.name}/{run_id}"
    (folder / JOB_FILE).write_text(dump_job(moved))
    for name, source in code.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    manifest: dict[str, Any] = {"run_id": run_id, "run_folder": run_folder}
    manifest["secrets"] = sorted(hidden)
    if not options.is_reproducible:
        manifest[SUBMISSION] = randomness.token_hex(8)
        if not options.is_any_version:
            manifest[VERSIONS] = versions()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    _check_content(folder, hidden)
    cluster = job.cluster
    return Packed(
        run_id,
        job.name,
        folder,
        ENTRYPOINT,
        run_folder,
        Shape(
            cluster.workers, Worker(float(cluster.cpus_per_worker), float(cluster.gpus_per_worker))
        ),
        versions(),
        inputs,
        outputs,
        hidden,
    )


def _check_content(folder: Path, hidden: dict[str, str]) -> None:
    size = 0
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        size += len(content)
        for name, value in hidden.items():
            if len(value) >= _SHORTEST_SECRET and value.encode() in content:
                raise UserError(
                    f"the value of {name} stands in {path.relative_to(folder)}, which would be "
                    "sent; secrets are allowed in the environment only. Read it from there."
                )
        if b"PRIVATE KEY-----" in content:
            raise UserError(
                f"{path.relative_to(folder)} holds a private key, and would be sent. Take it out, "
                "and read it from the environment (--env NAME)."
            )
    if size > _MOST_BYTES:
        raise UserError(
            f"the code that the job names has {size / 2**20:.0f} MiB; {_MOST_BYTES // 2**20} MiB "
            "are allowed. Keep data out of Python files."
        )


def _move_paths(values: dict[str, Any], there: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Make paths of a job absolute, for the cluster; returns its inputs and outputs by field."""
    inputs: dict[str, list[str]] = {}
    outputs: dict[str, str] = {}

    def moved(path: str) -> str:
        return path if "://" in path else os.path.normpath(os.path.join(there, path))

    def move(section: dict[str, Any] | None, key: str, name: str, is_output: bool = False) -> None:
        value = section.get(key) if section else None
        if section is None or value is None:
            return
        paths = [moved(path) for path in ([value] if isinstance(value, str) else value)]
        section[key] = paths[0] if isinstance(value, str) else paths
        local = [path for path in paths if "://" not in path]
        if local and is_output:
            outputs[name] = local[0]
        elif local:
            inputs[name] = local

    data = values["data"]
    for role in ("train", "validation", "test"):
        move(data, role, f"data.{role}")
    move(data["images"], "labels", "data.images.labels")
    if not names_version(values["model"]["file"] or ""):  # the cluster's registry knows it
        move(values["model"], "file", "model.file")
    move(data, "ingest_dir", "data.ingest_dir", is_output=True)
    move(values["checkpoint"], "uri", "checkpoint.uri", is_output=True)
    move(values, "runs_dir", "runs_dir", is_output=True)
    return inputs, outputs


def _renamed(value: Any, place: Callable[[str], str]) -> Any:
    """A job's values with the names of the user's code as they are on the other side."""
    if isinstance(value, dict):
        return {_renamed(key, place): _renamed(element, place) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(element, place) for element in value]
    return place(value) if isinstance(value, str) else value


@dataclass
class _Code:
    """Collects the user's Python files: those that are named, and the local ones they import.

    Attributes:
        root: The folder in which commands are given.
        files: Sources by the name that they are sent under.
    """

    root: Path
    files: dict[str, Path] = field(default_factory=dict)
    _outside: list[Path] = field(default_factory=list)

    def place(self, name: str) -> str:
        """`path/to/file.py:Name` as it is there, its file collected; any other text as it is."""
        found = _CODE.fullmatch(name)
        if found is None:
            return name
        place, attribute = found["place"], found["attribute"]
        if place.endswith(".py"):
            source = Path(place).absolute()
            if not source.is_file():
                raise UserError(
                    f"received {name!r}, but there is no file {place}. Name the Python file that "
                    f"holds {attribute}."
                )
            return f"{self._collect(source, source.parent)}:{attribute}"
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", place):
            self._collect_module(place.split("."), [self.root])
        return name

    def _collect(self, source: Path, import_root: Path) -> str:
        """Take a file, and what it imports, in; returns the name that it is sent under."""
        sent_as = self._sent_as(source, import_root)
        if sent_as in self.files:
            return sent_as
        self.files[sent_as] = source
        try:
            tree = ast.parse(source.read_bytes(), str(source))
        except SyntaxError as error:
            raise UserError(f"{source}:{error.lineno}: {error.msg}. Correct the file.") from None
        package = [] if source.parent == import_root else _package_of(source, import_root)
        for module in _imported(tree, package):
            self._collect_module(module, [import_root, self.root])
        return sent_as

    def _collect_module(self, module: list[str], roots: list[Path]) -> None:
        """Take a module in, and the packages that it is in, where they are below a root."""
        if module[0] in _OWN:
            return
        for root in roots:
            found = [
                path
                for length in range(1, len(module) + 1)
                for path in (
                    root.joinpath(*module[:length], "__init__.py"),
                    root.joinpath(*module[:length]).with_suffix(".py"),
                )
                if path.is_file()
            ]
            for path in found:
                self._collect(path, root)
            if found:
                return

    def _sent_as(self, source: Path, import_root: Path) -> str:
        if source.is_relative_to(self.root):
            return source.relative_to(self.root).as_posix()
        if import_root not in self._outside:
            self._outside.append(import_root)
        number = self._outside.index(import_root)
        return f"elsewhere{number}/{source.relative_to(import_root).as_posix()}"


def _package_of(source: Path, import_root: Path) -> list[str]:
    if not source.is_relative_to(import_root):
        return []
    return list(source.relative_to(import_root).parent.parts)


def _imported(tree: ast.Module, package: list[str]) -> Iterator[list[str]]:
    """Modules that a file may import, anywhere in it; a name may be a module or what is in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            if module:
                yield module
            yield from ([*module, alias.name] for alias in node.names if alias.name != "*")
