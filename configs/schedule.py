"""When a pipeline runs by itself: the section `schedule` of a pipeline file.

Whether the cron expression can be read, and is ever due, is checked by `cluster.cron`, which knows
the calendar.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from configs.errors import JobError
from configs.section import Section
from configs.yaml_text import parse_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ScheduleConfig(Section):
    """Times to run at, and what happens when two of them meet."""

    cron: str = Field(
        description="Five fields: minute, hour, day of month, month, day of week; such as "
        "`30 2 * * *`, each night at half past two. @hourly, @daily, @weekly, @monthly and @yearly "
        "are short for some."
    )
    timezone: str = Field(
        "UTC",
        description="The zone in which cron is read, by its IANA name, such as Europe/Zurich.",
    )
    jitter_s: float = Field(
        0.0,
        description="Each run starts up to this many seconds late, by an amount that the schedule "
        "and the tick decide, so that many schedules do not start at once; never later than the "
        "next tick. 0: on time.",
        ge=0,
        le=3600,
    )
    overlap: Literal["skip", "queue"] = Field(
        "skip",
        description="What a tick does while the run before it goes on. skip: nothing, and the "
        "history says so. queue: one run starts when the other has ended; more ticks change "
        "nothing.",
    )


@dataclass(frozen=True)
class NamedSchedule:
    """What a scheduler has to know of a pipeline file.

    Attributes:
        name: The pipeline's.
        config: Its section `schedule`.
    """

    name: str
    config: ScheduleConfig


def load_schedule(path: Path) -> NamedSchedule | None:
    """Name and schedule of a pipeline file; None where a file has no section `schedule`.

    Raises:
        JobError: It cannot be read, or the name or the section is wrong.
    """
    try:
        values = parse_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"cannot read {path}: {error}. A pipeline file is allowed.") from None
    if not isinstance(values, dict) or values.get("schedule") is None:
        return None
    name = values.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise JobError(
            f"{path}: name: received {name!r}; letters, digits, '_', '-' and '.' are allowed, a "
            "letter or digit first. Give the pipeline a name."
        )
    try:
        return NamedSchedule(name, ScheduleConfig.model_validate(values["schedule"]))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(["schedule", *map(str, first["loc"])])
        fields = ", ".join(ScheduleConfig.model_fields)
        raise JobError(
            f"{path}: {field}: {first['msg']}; {fields} are allowed. Correct it."
        ) from None
