"""What a job's data is: the Python side of `lockstep data show`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.load import load_job
from configs.schema import Job
from data_pipeline.describe import describe_columns, describe_shares, sample_rows, source_facts
from data_pipeline.quality import shuffle_quality
from lockstep.registration import origin_of
from trainer.preflight import open_sources, plan_data


def describe_data(
    job: Job | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    rows: int = 5,
) -> dict[str, Any]:
    """What a job's data is, as plain values.

    Names: `sources`, `columns`, `sample`, `order`, `shuffle_quality` (of files that are sorted by
    the label, the worst case; see `data_pipeline.quality`), `workers`. Reads all training rows
    twice, once more than training does before its first step; starts nothing.

    Args:
        job: A Job, a mapping, or the path of a job file.
        overrides: `a.b=value`, applied last.
        rows: Rows of the sample.

    Raises:
        UserError: Something is wrong with the job or its data.
    """
    loaded = origin_of(load_job(job, overrides)).job
    sources, layout = open_sources(loaded)
    data = plan_data(loaded, sources, layout)
    plan, train_rows = data.plan, data.sources["train"]
    sample = sample_rows(plan, train_rows, layout, loaded.data.on_null, rows)
    cache_bytes = loaded.data.cache_mb * 2**20
    return {
        "sources": {role: source_facts(source) for role, source in sources.items()},
        "columns": describe_columns(train_rows, layout),
        "sample": [
            {name: value if _is_plain(value) else str(value) for name, value in row.items()}
            for row in sample.to_pylist()
        ],
        "order": {
            "shuffle": plan.shuffle,
            "window_rows": plan.rows_per_window,
            "virtual_shards": plan.virtual_shards,
            "global_batch_size": plan.global_batch_size,
            "steps_per_epoch": plan.steps_per_epoch,
        },
        "shuffle_quality": asdict(shuffle_quality(plan)),
        "workers": describe_shares(plan, layout, loaded.cluster.workers, cache_bytes),
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | list | None)
