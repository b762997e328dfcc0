"""Files of jobs, pipelines and services: YAML in, checked values out, errors with file and line.

Owns precedence (override, then YAML, then default) and the wording of what pydantic finds. Reads
nothing but the file itself, and for a pipeline the job file that it names.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import JobError, UserError, did_you_mean
from configs.pipeline import Pipeline
from configs.schema import Job
from configs.section import Section
from configs.service import ServiceConfig
from configs.yaml_text import Dumper, parse_yaml

Root = TypeVar("Root", bound=Section)
Place = tuple[str | int, ...]

_NEEDED = {
    "job": "name, model, data and train is allowed. See `lockstep schema`",
    "pipeline": "name, job and data is allowed. See `lockstep schema --pipeline`",
    "service": "settings is allowed. See docs/serving.md",
}


def load_job(source: Job | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Job:
    """A checked job from a `Job`, a mapping, or the path of a YAML file.

    `overrides` are `a.b=value`, the value in YAML; a later one wins.

    Raises JobError with the file, the line and the field of the first mistakes.
    """
    values, origins = _values(source, "job")
    return _checked(Job, values, overrides, origins, "job")


def load_pipeline(
    source: Pipeline | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> Pipeline:
    """A checked pipeline from a `Pipeline`, a mapping, or the path of a YAML file.

    `overrides` are as those of `load_job`; they reach into the job by `job.a.b=value`, also where
    it stands in a file of its own. Paths are relative to the working directory.

    Raises JobError with the file, the line and the field of the first mistakes.
    """
    values, origins = _values(source, "pipeline")
    whole = [override for override in overrides if override.startswith("job=")]
    for override in whole:
        _apply_override(values, override)
    rest = [override for override in overrides if override not in whole]
    if isinstance(values.get("job"), str | Path):
        inner = [o.removeprefix("job.") for o in rest if o.startswith("job.")]
        rest = [override for override in rest if not override.startswith("job.")]
        values["job"] = load_job(values["job"], inner)
    return _checked(Pipeline, values, rest, origins, "pipeline")


def load_service(file: str | Path | None, options: Mapping[str, Any]) -> ServiceConfig:
    """Checked settings of a service: options of the command first, those not None; then the file.

    Raises JobError with the file and the line, or the option, and the field of the first mistakes.
    """
    values, origins = ({}, {}) if file is None else _values(file, "service")
    for name, value in options.items():
        if value is not None:
            values[name] = value
            origins[(name,)] = "--" + name.replace("_", "-")
    return _checked(ServiceConfig, values, (), origins, "service")


def _values(
    source: Section | Mapping[str, Any] | str | Path, noun: str
) -> tuple[dict[str, Any], dict[Place, str]]:
    """Values, and where each of them stands: file and line."""
    if isinstance(source, str | Path):
        path = Path(source)
        text = _read(path, noun)
        values = _parse(text, path, noun)
        origins = {place: f"{path}:{line}" for place, line in _line_numbers(text, path).items()}
        return values, {(): str(path), **origins}
    return source.model_dump() if isinstance(source, Section) else dict(source), {}


def _checked(
    root: type[Root],
    values: dict[str, Any],
    overrides: Sequence[str],
    origins: dict[Place, str],
    noun: str,
) -> Root:
    for override in overrides:
        place = _apply_override(values, override)
        origins = {p: origin for p, origin in origins.items() if p[: len(place)] != place}
        origins[place] = "--set"
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise JobError(_explain(root, error, origins, noun)) from None


def dump_job(job: Job) -> str:
    """The job as YAML that `load_job` reads back to an equal job; tuples come back as lists.

    Raises JobError where an argument of a job made in Python is more than a plain value.
    """
    try:
        return yaml.dump(job.model_dump(), Dumper=Dumper, sort_keys=False)
    except yaml.representer.RepresenterError as error:
        raise JobError(
            f"received {error.args[-1]!r} in the job; numbers, texts, booleans, and lists and "
            "mappings of them are allowed. Pass a plain value, and make the object from it in "
            "the builder."
        ) from None


def job_digest(job: Job) -> str:
    """Sixteen hex digits that are equal for equal jobs, apart from fields a resume may change."""
    values = job.model_dump(mode="json", exclude=RESUMABLE_FIELDS)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


RESUMABLE_FIELDS: dict[str, Any] = {
    "cluster": True,
    "checkpoint": True,
    "export": True,
    "tracking": True,
    "runs_dir": True,
    "train": {"epochs", "steps_per_execution", "max_time_s"},
}
"""What may differ between a run and its resumption: nothing that earlier steps depended on."""


def differing_fields(job: Job, other: Job) -> list[str]:
    """Dotted names of the fields in which two jobs differ and must not, for one run."""
    first = job.model_dump(mode="json", exclude=RESUMABLE_FIELDS)
    second = other.model_dump(mode="json", exclude=RESUMABLE_FIELDS)
    return _differences(first, second, "")


def _differences(first: Any, second: Any, prefix: str) -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        names: list[str] = []
        for key in sorted({*first, *second}):
            dotted = f"{prefix}.{key}" if prefix else str(key)
            names += _differences(first.get(key), second.get(key), dotted)
        return names
    return [] if first == second else [prefix]


def _represent_as(kind: type, dumper: yaml.SafeDumper, value: Any) -> yaml.Node:
    node: yaml.Node = dumper.represent_data(kind(value))
    return node


for _kind in (str, int, float):  # what is derived from these is written as these: numpy.float64
    Dumper.add_multi_representer(_kind, functools.partial(_represent_as, _kind))


def _read(path: Path, noun: str) -> str:
    if path.is_dir():
        raise JobError(f"{path} is a folder; a {noun} file is allowed. Name the YAML file in it.")
    try:
        return path.read_text()
    except FileNotFoundError:
        raise JobError(_missing_file(path, noun)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot read {path}: {error}. A text file in YAML is allowed.") from None


def _missing_file(path: Path, noun: str) -> str:
    folder = path.parent
    names = [entry.name for entry in folder.glob("*.yaml")] if folder.is_dir() else []
    guess = did_you_mean(path.name, names)
    return f"no {noun} file at {path}; the path of a YAML file is needed.{guess}"


def _parse(text: str, path: Path, noun: str) -> dict[str, Any]:
    try:
        values = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or error
        raise JobError(f"{place}: not valid YAML: {problem}. Correct the line.") from None
    if values is None and noun == "service":  # all settings have defaults
        return {}
    if not isinstance(values, dict):
        kind = "nothing" if values is None else type(values).__name__
        raise JobError(f"{path}: received {kind}; a mapping with {_NEEDED[noun]}.")
    return values


def _line_numbers(text: str, path: Path) -> dict[Place, int]:
    """Line of each key and list entry of a YAML text, by its place in the tree.

    Raises JobError where a key stands twice: YAML would silently take the last.
    """
    lines: dict[Place, int] = {}

    def visit(node: yaml.Node | None, place: Place) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()  # with the type: 0 and '0' are two keys
            for key, value in node.value:
                line = key.start_mark.line + 1
                if (key.tag, key.value) in seen:
                    dotted = ".".join(map(str, (*place, key.value)))
                    raise JobError(
                        f"{path}:{line}: {dotted} stands here and in line "
                        f"{lines[(*place, key.value)]}; each key once is allowed. Remove one."
                    )
                seen.add((key.tag, key.value))
                lines[(*place, key.value)] = line
                visit(value, (*place, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*place, index)] = value.start_mark.line + 1
                visit(value, (*place, index))

    try:
        visit(yaml.compose(text, Loader=yaml.SafeLoader), ())
    except RecursionError:
        raise JobError(
            f"{path}: an alias (*) stands inside of what it names; values that end are allowed. "
            "Write the value out."
        ) from None
    return lines


def _apply_override(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set one dotted field; returns the place of the field, or of the section made for it."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise UserError(
            f"--set received {override!r}; the form a.b=value is allowed, such as "
            "--set train.epochs=5."
        )
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not valid YAML. Quote the value.") from None
    keys = name.split(".")
    target, place = values, tuple(keys)
    for depth, key in enumerate(keys[:-1]):
        if target.get(key) is None:
            target[key] = {}
            place = place[: depth + 1]
        if not isinstance(target[key], dict):
            inner = ".".join(keys[: depth + 1])
            raise UserError(
                f"--set {override}: {inner} holds {target[key]!r}, not fields. Set {inner} whole."
            )
        target[key] = dict(target[key])
        target = target[key]
    target[keys[-1]] = value
    return place


def _explain(
    root: type[Section],
    error: ValidationError,
    origins: Mapping[Place, str],
    noun: str,
) -> str:
    messages = []
    for details in error.errors(include_url=False):
        place = _schema_place(details)
        around = [origins[place[:n]] for n in range(len(place), -1, -1) if place[:n] in origins]
        messages.append(f"{(around or [noun])[0]}: {_sentence(root, details, place)}")
    return "\n".join(dict.fromkeys(messages))


def _schema_place(details: ErrorDetails) -> Place:
    """The place in the file: pydantic adds the tried type of a union to the location."""
    *outer, last = details["loc"] or ("str",)
    place = [part for part in outer if _is_field(part)]
    if details["type"] == "extra_forbidden" or _is_field(last):  # an unknown key can be any text
        place.append(last)
    return tuple(place)


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part != "str")


def _sentence(root: type[Section], details: ErrorDetails, place: Place) -> str:
    dotted = ".".join(str(part) for part in place)
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        allowed = _allowed_keys(root, place[:-1])
        return (
            f"unknown key {dotted}; allowed here: {', '.join(allowed)}."
            f"{did_you_mean(str(place[-1]), allowed)}"
        )
    if kind == "missing":
        return f"{dotted} is missing. Add it."
    if kind == "value_error":
        text = details["msg"].removeprefix("Value error, ")
        return f"{dotted}: {text}" if dotted else text
    received = "a mapping" if isinstance(value, dict) else repr(value)
    allowed_text = details["msg"].removeprefix("Input should be ")
    allowed_text = allowed_text[0].lower() + allowed_text[1:]
    if kind in ("model_type", "dict_type"):  # pydantic would speak of dictionaries and instances
        allowed_text = "a mapping"
    return f"{dotted}: received {received}; allowed: {allowed_text}. Change {dotted}."


def _allowed_keys(root: type[BaseModel], place: Place) -> list[str]:
    """Field names of the section at `place`."""
    section = root
    for part in place:
        if isinstance(part, int):
            continue
        section = _section_of(section, part)
    return list(section.model_fields)


def _section_of(section: type[BaseModel], name: str) -> type[BaseModel]:
    """The section that a field holds, looked for inside unions and lists."""
    stack: list[Any] = [section.model_fields[name].annotation]
    while stack:
        annotation = stack.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        stack.extend(getattr(annotation, "__args__", ()))
    return section
