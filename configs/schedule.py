"""When a pipeline runs by itself: the section `schedule` of a pipeline file.

Whether the cron expression ever fires is checked by `cluster.schedule`, which knows the calendar.
"""

from typing import Literal

from pydantic import Field

from configs.section import Section


class ScheduleConfig(Section):
    """Times to run at, and what happens when two of them meet."""

    cron: str = Field(
        description="Five fields: minute, hour, day of month, month, day of week; such as "
        "`30 2 * * *`, each night at half past two."
    )
    timezone: str = Field(
        "UTC",
        description="The zone in which cron is read, by its IANA name, such as Europe/Zurich.",
    )
    jitter_s: float = Field(
        0.0,
        description="Each run starts up to this many seconds late, by an amount that the schedule "
        "and the tick decide, so that many schedules do not start at once. 0: on time.",
        ge=0,
        le=3600,
    )
    overlap: Literal["skip", "queue"] = Field(
        "skip",
        description="What a tick does while the run before it goes on. skip: nothing, and the "
        "history says so. queue: one run starts when the other has ended; more ticks change "
        "nothing.",
    )
