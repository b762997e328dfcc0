"""Which files and rows a pipeline's run reads: what is new, what judges, what trains.

Owns the watermark (what the champion's run saw) and how the section `data` of a pipeline becomes
files and rules for rows. Copies are made by `data_pipeline.frozen`.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.pipeline import MAX_SLICES, Pipeline
from data_pipeline.errors import DataError
from data_pipeline.frozen import RowRules, days_us, has_moment, newest_moment
from data_pipeline.inventory import (
    Identity,
    Inventory,
    inventory_record,
    new_files,
    read_inventory,
    take_inventory,
)
from data_pipeline.provenance import listed, provenance_of_states
from data_pipeline.storage import FileState
from registry.store import Version

Found = dict[str, Any]
"""What `look_for_news` found, as plain values."""


def look_for_news(pipeline: Pipeline, champion: Version | None, seen: Found | None = None) -> Found:
    """Files now, against those that the champion's run saw.

    Args:
        pipeline: The pipeline.
        champion: Its champion, or None.
        seen: What the champion's run found, if a run of this pipeline made it.

    Returns:
        `is_new`, `reason`, `files` and `held_out` (inventories), `new` and `unseen` (paths that are
        new or changed, and those that were not there), and `newest_us` and `before_us`, the newest
        moments now and then, with a time column.

    Raises:
        DataError: There are no files, or they hold no times.
        ReadError: Storage does not answer.
    """
    data = pipeline.data
    before, before_us = _watermark(champion, seen)
    held_out = held_out_files(pipeline, read_inventory((seen or {}).get("held_out", {})))
    files = {p: i for p, i in _files_there(pipeline, before).items() if p not in held_out}
    new = new_files(files, before)
    unseen = [path for path in files if path not in before]
    newest_us = None
    if data.time_column is not None:
        newest_us = newest_moment(pipeline.job.data, list(files), data.time_column)
        is_new = before_us is None or newest_us > before_us
        if not is_new and unseen:  # of the newest moment then, but written later
            is_new = has_moment(pipeline.job.data, unseen, data.time_column, newest_us)
        reason = f"rows up to {_moment(newest_us)}" if is_new else "no later rows"
    else:
        is_new = bool(new)
        reason = f"{len(new)} of {len(files)} files are new" if new else "no file is new"
    if not is_new:
        reason = f"nothing new: {reason} since {champion}, the champion, was trained"
    return {
        "is_new": is_new,
        "reason": reason,
        "files": inventory_record(files),
        "held_out": inventory_record(held_out),
        "new": new,
        "unseen": unseen,
        "newest_us": newest_us,
        "before_us": before_us,
    }


def files_now(pipeline: Pipeline, known: Inventory) -> dict[str, Identity]:
    """All files of rows that train or judge, but for those that are held out."""
    held_out = held_out_files(pipeline)
    return {p: i for p, i in _files_there(pipeline, known).items() if p not in held_out}


def _files_there(pipeline: Pipeline, known: Inventory) -> dict[str, Identity]:
    data, job = pipeline.data, pipeline.job
    is_hashed = data.identity == "hash"
    return take_inventory("data.files", data.files or job.data.train, job.data, is_hashed, known)


def held_out_files(pipeline: Pipeline, known: Inventory | None = None) -> dict[str, Identity]:
    """Files that never train; with `known`, an earlier inventory, by the pipeline's identity."""
    data, job = pipeline.data, pipeline.job
    if data.evaluation.files is None:
        return {}
    is_hashed = known is not None and data.identity == "hash"
    paths = data.evaluation.files
    return take_inventory("data.evaluation.files", paths, job.data, is_hashed, known or {})


def lineage_of_files(found: Found) -> Any:
    """What a version's lineage says of the files, those that are held out too.

    Raises:
        ReadError: A file has changed since it was found.
    """
    inventories = read_inventory(found["files"]), read_inventory(found["held_out"])
    states = [
        FileState(path, identity.size_bytes, identity.modified_ns)
        for path, identity in (each for files in inventories for each in files.items())
    ]
    return listed(provenance_of_states(states))


def roles_of_files(pipeline: Pipeline, found: Found) -> tuple[list[str], list[str]]:
    """Files that judge, and files that train."""
    data = pipeline.data
    files = list(found["files"])
    judging, training = files, files
    if data.evaluation.files is not None:
        judging = list(held_out_files(pipeline))
    elif data.evaluation.newest_files is not None:
        count = data.evaluation.newest_files
        judging, training = files[-count:], files[:-count]
    if data.window_files is not None:
        training = training[-data.window_files :]
    if data.train_on == "new" and found["champion"] is not None and data.time_column is None:
        new = set(found["new"])
        training = [path for path in training if path in new]
        if not training:
            raise DataError(
                "data.train_on: new, but no file is new; at least one has to train. Add files, or "
                "set data.train_on to all."
            )
    if not training:
        raise DataError(
            f"data: {len(files)} file(s) are there, and all of them judge; at least one has to "
            "train. Add files, or let fewer judge."
        )
    return judging, training


def check_slices(evaluation: str, columns: Sequence[str]) -> None:
    """Whether the columns of `gate.slices` have few enough values in the rows that judge.

    Raises DataError.
    """
    for column in columns:
        values = pc.count_distinct(pq.read_table(evaluation, columns=[column])[column]).as_py()
        if values > MAX_SLICES:
            raise DataError(
                f"gate.slices: column {column!r} has {values:,} values; {MAX_SLICES:,} or fewer "
                "make slices. Name a column with fewer, such as a class of the value."
            )


def rules_for_rows(pipeline: Pipeline, found: Found) -> RowRules:
    """Which rows judge and train, where that is decided row by row."""
    data, job = pipeline.data, pipeline.job
    judges_after = trains_after = None
    end = found["newest_us"]
    if data.evaluation.newest_days is not None:
        end = judges_after = found["newest_us"] - days_us(data.evaluation.newest_days)
    if data.window_days is not None:
        trains_after = end - days_us(data.window_days)
    unseen: frozenset[str] = frozenset()
    if data.train_on == "new" and found["champion"] is not None:
        trains_after, unseen = found["before_us"], frozenset(found["unseen"])
    is_by_time = judges_after is not None or trains_after is not None
    fraction = data.evaluation.fraction
    key = tuple(data.evaluation.key or job.data.columns) if fraction is not None else ()
    time_column = data.time_column if is_by_time else None
    return RowRules(fraction, key, time_column, judges_after, trains_after, unseen)


def _watermark(
    champion: Version | None, seen: Found | None
) -> tuple[dict[str, Identity], int | None]:
    """Files that the champion's run saw, and its newest moment.

    Of a champion from elsewhere the files that it trained on are known, by their sizes, where its
    lineage lists them.
    """
    if champion is None:
        return {}, None
    if seen is not None:
        return read_inventory(seen["files"]), seen["newest_us"]
    trained = (champion.lineage.get("data") or {}).get("train") or []
    files = trained if isinstance(trained, list) else []
    return {file["path"]: Identity(file["size_bytes"]) for file in files}, None


def _moment(moment_us: int) -> str:
    seconds = moment_us / 1e6
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
