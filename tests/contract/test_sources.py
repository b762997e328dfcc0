"""Every kind of source gives the same rows, from any step on, to any number of workers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from configs.data import DataConfig
from data_pipeline import converted
from data_pipeline.blocks import BlockReader
from data_pipeline.features import InputLayout, input_layout
from data_pipeline.ingest import ingested
from data_pipeline.plan import Plan, Share, Shuffle
from data_pipeline.reader import TrainingChunks
from data_pipeline.scan import scan
from data_pipeline.source import open_source
from tests.support.kinds import ROWS, WRITERS, numbered, write_images
from tests.support.orders import row_order

IMAGE_ROWS = 60
KINDS = [*WRITERS, "images"]
EPOCHS = 2
BATCH = 64


@dataclass(frozen=True)
class Opened:
    """A source as training has it before its first step."""

    reader: BlockReader
    layout: InputLayout
    block_rows: NDArray[np.int64]
    rows: int

    def plan(self, shuffle: Shuffle, batch: int = BATCH) -> Plan:
        return Plan(self.block_rows, batch, 6, 32, shuffle, 5)

    def chunks(self, plan: Plan, rank: int, workers: int) -> TrainingChunks:
        share = Share(plan, rank, workers)
        return TrainingChunks(share, self.reader, self.layout, EPOCHS, has_places=True)


def open_kind(kind: str, folder: Path) -> Opened:
    images: dict[str, Any] = {}
    if kind == "images":
        labels = write_images(folder / "rows", IMAGE_ROWS)
        images = {
            "features": ["image"],
            "label": "label",
            "images": {"height": 2, "width": 3, "labels": str(labels)},
        }
    else:
        WRITERS[kind](folder / "rows")
    data = DataConfig.model_validate(
        {
            "train": str(folder / "rows"),
            "features": ["x", "a"],
            "label": "y",
            "ingest_dir": str(folder / "cache"),
            **images,
        }
    )
    source = open_source("train", ingested("train", data.train, data), data.columns)
    layout = input_layout(data, source)
    found = scan(source, layout, "error")
    reader = BlockReader(source, layout, "error", 2**22)
    return Opened(reader, layout, found.block_rows, source.rows)


@pytest.fixture(scope="module", params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converted, "_GROUP_ROWS", 17 if request.param == "images" else 97)
        patch.setattr("data_pipeline.formats.images._PIECE_IMAGES", 7)
        return open_kind(request.param, tmp_path_factory.mktemp(request.param))


def ids_from(opened: Opened, plan: Plan, workers: int, first: int, last: int) -> NDArray[Any]:
    """The labels of steps `[first, last)`, put together from the parts of all workers.

    Each worker starts anew at `first`, as after a restore, and checks its inputs.
    """
    steps: dict[int, NDArray[Any]] = {}
    for rank in range(workers):
        chunks = opened.chunks(plan, rank, workers)
        step = first
        while step < last:
            chunk, index = chunks.chunk_of(step)
            inputs, labels, _, offsets, global_rows, places = chunks.assemble(chunk)
            inputs = inputs.reshape(len(labels), -1)
            for part in range(index, min(len(global_rows), index + last - step)):
                rows = slice(offsets[part], offsets[part + 1])
                whole = steps.setdefault(step, np.full(int(global_rows[part]), 1))
                assert (whole[places[rows]] == 1).all(), "a row came twice"
                whole[places[rows]] = labels[rows, 0]
                np.testing.assert_array_equal(inputs[rows, 0], -labels[rows, 0])
                step += 1
    return -np.concatenate([steps[step] for step in sorted(steps)])


def test_rows_are_those_that_were_written(opened: Opened) -> None:
    plan = opened.plan("none")
    found = ids_from(opened, plan, 1, 0, plan.steps_per_epoch)
    np.testing.assert_array_equal(found, np.arange(opened.rows))
    inputs = opened.chunks(plan, 0, 1).assemble(0)[0]
    if opened.rows == ROWS:
        np.testing.assert_array_equal(inputs[:, 1], numbered()["a"].to_numpy())
    else:
        assert inputs.shape == (IMAGE_ROWS, 2, 3, 3)
        assert (inputs.reshape(IMAGE_ROWS, -1)[:, 1:] == 7).all()
    assert len(opened.block_rows) > 3


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("shuffle", ["window", "none"])
def test_what_remains_after_any_step_is_what_is_left(
    opened: Opened, shuffle: Shuffle, before: int, after: int
) -> None:
    plan = opened.plan(shuffle, BATCH if opened.rows == ROWS else 7)
    expected = np.concatenate([row_order(plan, epoch) for epoch in range(EPOCHS)])
    last = plan.steps_per_epoch * EPOCHS
    undisturbed = ids_from(opened, plan, before, 0, last)
    np.testing.assert_array_equal(undisturbed, expected)
    for step in range(last):
        epoch, of_epoch = divmod(step, plan.steps_per_epoch)
        seen = epoch * plan.rows + plan.rows_before_step(of_epoch)
        rest = ids_from(opened, plan, after, step, last)
        np.testing.assert_array_equal(rest, expected[seen:], f"restored at step {step}")
