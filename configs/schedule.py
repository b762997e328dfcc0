"""When a pipeline runs by itself: the section `schedule` of a pipeline file.

Whether the cron expression can be read, and is ever due, is checked by `cluster.cron`, which knows
the calendar.
"""

from typing import Literal

from pydantic import Field

from configs.section import Section


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
