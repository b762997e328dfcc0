"""Command lines in manifests: `lockstep` parses them, and the files they name are mounted."""

import ast
import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from lockstep.cli import app
from tests.deploy.checks.objects import Finding, Manifest, Pod, of_kind, pods

ROOT = Path(__file__).parents[3]
# What containers of other images run.
OTHER_PROGRAMS = ("bash", "sh", "sleep", "mlflow", "pg_isready", "redis-server", "pg_dump")
_MODULE_RUN = re.compile(r"exec env -C (?P<folder>\S+) python -P -m (?P<module>[\w.]+)")
# Rights that a launcher uses, by what it does with them (lockstep/kubernetes_jobs.py).
LAUNCHER_RIGHTS = {
    ("ray.io", "rayjobs"): {"get", "list", "create", "delete"},
    ("policy", "poddisruptionbudgets"): {"get", "create", "delete"},
    ("", "configmaps"): {"get", "list"},
    ("", "pods"): {"list"},
    ("", "pods/log"): {"get"},
}


def commands(objects: list[Manifest]) -> Iterator[Finding]:
    """Findings under the rules `command` and `file`."""
    for pod in pods(objects):
        for line in _lines(pod):
            for text in problems(line):
                yield Finding("command", pod.where, text)
            yield from (Finding("file", pod.where, text) for text in _files(line, pod, objects))
        if any("launch" in line for line in _lines(pod)):
            yield from (Finding("rights", pod.where, text) for text in _rights(pod, objects))
    for manifest in of_kind(objects, "RayJob"):
        text = manifest["spec"].get("entrypoint", "")
        where = f"RayJob/{manifest['metadata']['name']} entrypoint"
        if found := _MODULE_RUN.fullmatch(text):
            yield from _module_run(found, manifest, where)
            continue
        line = shlex.split(text)
        if not line or Path(line[0]).name != "lockstep":
            yield Finding("command", where, "the entrypoint does not run lockstep")
            continue
        yield from (Finding("command", where, text) for text in problems(line))
        for pod in pods([manifest]):
            if pod.node in ("head", "worker"):
                found = _files(line, pod, objects)
                yield from (Finding("file", pod.where, text) for text in found)
    for manifest in of_kind(objects, "RayService"):
        for text in serve_config(manifest, objects):
            yield Finding("command", f"RayService/{manifest['metadata']['name']}", text)


def _module_run(found: re.Match[str], manifest: Manifest, where: str) -> Iterator[Finding]:
    """`exec env -C FOLDER python -P -m MODULE`: the module is there, the folder is mounted."""
    folder, module = found["folder"], found["module"]
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        yield Finding("command", where, f"there is no module {module}")
    for pod in pods([manifest]):
        mounts = [
            mount["mountPath"]
            for container in pod.containers
            for mount in container.get("volumeMounts") or ()
        ]
        if pod.node in ("head", "worker") and folder not in mounts:
            yield Finding("file", pod.where, f"{folder}: nothing is mounted there")


def _lines(pod: Pod) -> Iterator[list[str]]:
    for container in pod.containers:
        line = [*(container.get("command") or ()), *(container.get("args") or ())]
        if line:
            yield line
        for hook in (container.get("lifecycle") or {}).values():
            if "exec" in hook:
                yield hook["exec"]["command"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "exec" in (container.get(probe) or {}):
                yield container[probe]["exec"]["command"]


def problems(line: list[str]) -> tuple[str, ...]:
    """What is wrong with a command line; nothing is run."""
    return _problems(tuple(str(word) for word in line))


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)


@functools.lru_cache(maxsize=1024)
def _problems(line: tuple[str, ...]) -> tuple[str, ...]:
    if line[:2] == ("tini", "--"):
        line = line[2:]
    program = Path(line[0]).name
    if program != "lockstep":
        return () if program in OTHER_PROGRAMS else (f"an unknown program: {program}",)
    try:
        _parse(_command(), line[1:])
    except typer.Exit:
        return ()
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer has click's errors in several places
            raise
        return (f"{' '.join(line)}: {error.format_message()}",)
    return ()


def _parse(command: Any, words: Sequence[str]) -> None:
    """Parse as click would before it runs anything."""
    context = command.make_context(command.name or "lockstep", list(words))
    with context:
        if hasattr(command, "resolve_command"):
            rest = [*context._protected_args, *context.args]
            _, inner, remaining = command.resolve_command(context, rest)
            _parse(inner, remaining)


def _files(line: list[str], pod: Pod, objects: list[Manifest]) -> list[str]:
    return [
        text
        for word in line
        for path in re.findall(r"/etc/lockstep/[\w./-]+", str(word))
        if (text := missing_file(path, pod, objects))
    ]


def missing_file(path: str, pod: Pod, objects: list[Manifest]) -> str:
    """Why a file is not there in the pod's first container; "" where it is."""
    mounts = {
        mount["mountPath"]: mount["name"]
        for mount in pod.spec["containers"][0].get("volumeMounts") or ()
    }
    folder = next((place for place in mounts if path.startswith(f"{place}/")), None)
    if folder is None:
        return f"{path}: nothing is mounted there"
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or ()}
    source = volumes.get(mounts[folder], {}).get("configMap")
    if source is None:
        return f"{path}: {folder} is no config map"
    if source.get("optional"):
        return ""
    name = path.removeprefix(f"{folder}/")
    items = {item["path"] for item in source.get("items") or ()}
    for each in of_kind(objects, "ConfigMap"):
        if each["metadata"]["name"] == source["name"]:
            keys = items or set(each.get("data") or {})
            return "" if name in keys else f"{path}: config map {source['name']} has no {name}"
    return f"{path}: no config map {source['name']}"


def serve_config(manifest: Manifest, objects: list[Manifest]) -> Iterator[str]:
    """What is wrong with a service's applications: the code and the file that they name."""
    try:
        config = yaml.safe_load(manifest["spec"].get("serveConfigV2") or "")
    except yaml.YAMLError as error:
        yield f"serveConfigV2 is no YAML: {error}"
        return
    if not isinstance(config, dict):
        yield "serveConfigV2 is empty"
        return
    for application in config.get("applications", ()):
        module, _, name = str(application.get("import_path", "")).partition(":")
        path = ROOT / f"{module.replace('.', '/')}.py"
        if not path.is_file():
            yield f"import_path: there is no module {module}"
        elif name not in _defined(path):
            yield f"import_path: {module} has no {name}"
        for deployment in application.get("deployments") or ():
            if path.is_file() and f'name="{deployment.get("name")}"' not in path.read_text():
                yield f"{module} has no deployment {deployment.get('name')}"
        for value in (application.get("args") or {}).values():
            for pod in pods([manifest]):
                if str(value).startswith("/etc/") and (
                    text := missing_file(str(value), pod, objects)
                ):
                    yield f"{pod.place}: {text}"


def _defined(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [node.targets for node in tree.body if isinstance(node, ast.Assign)]
    return names | {each.id for group in targets for each in group if isinstance(each, ast.Name)}


def _rights(pod: Pod, objects: list[Manifest]) -> Iterator[str]:
    """Rights that `lockstep launch` uses and the pod's account has not."""
    account = pod.spec.get("serviceAccountName")
    roles = {
        binding["roleRef"]["name"]
        for binding in of_kind(objects, "RoleBinding")
        if any(subject["name"] == account for subject in binding.get("subjects") or ())
    }
    given: dict[tuple[str, str], set[str]] = {}
    for role in of_kind(objects, "Role"):
        if role["metadata"]["name"] in roles:
            for rule in role["rules"]:
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        given.setdefault((group, resource), set()).update(rule["verbs"])
    for (group, resource), verbs in LAUNCHER_RIGHTS.items():
        for verb in sorted(verbs - given.get((group, resource), set())):
            yield f"account {account} may not {verb} {resource}"
