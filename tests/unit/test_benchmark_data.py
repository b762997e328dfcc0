"""The arithmetic of `benchmarks.data`: what is counted, compared and held against a bar."""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import data_files
from benchmarks.data import Trials, compare, fact_rows
from benchmarks.data_files import Files, all_files
from benchmarks.data_peers import PEERS, timed
from benchmarks.data_scale import plan_at_scale
from benchmarks.harness import Row


def rows_of(**values: float) -> dict[str, Row]:
    names = [peer.name for peer in Trials(False).peers()]
    rows = {name: Row(name, "rows/s", (100.0, 120.0)) for name in names}
    facts = {
        "memory, share of the bound, file of 4 x the bound|x": 0.9,
        "planner, 10^6 blocks|s": 2.0,
        "planner, growth|MB": 300.0,
        "planner, slowest seek of 100|ms": 0.2,
        "numbers, Lockstep, decoded blocks to blocks|x": 1.0,
    }
    return rows | fact_rows([facts]) | {name: Row(name, "", (v,)) for name, v in values.items()}


def test_targets_are_ratios_of_medians_and_limits() -> None:
    ratios, targets = compare(rows_of())
    by_name = {target.name: target for target in targets}
    assert by_name["numbers to Ray Data iter_tf_batches"].value == 1.0
    assert [t.name for t in targets if t.is_met] == [
        "numbers to plain decoding",
        "memory, share of the bound, file of 4 x the bound",
        "planner, 10^6 blocks",
        "planner, growth",
        "planner, slowest seek of 100",
        "numbers, Lockstep, decoded blocks to blocks",
    ]
    assert [(t.name, t.target) for t in targets if not t.is_met] == [
        ("numbers to Ray Data iter_tf_batches", 8.0),
        ("numbers to from_tensor_slices", 4.0),
        ("two workers to one", 1.6),
    ]
    assert all(len(ratio.values) == 2 for ratio in ratios)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("planner, slowest seek of 100", 1.1),
        ("memory, share of the bound, file of 4 x the bound", 1.01),
        ("numbers, Lockstep, decoded blocks to blocks", 1.025),
    ],
)
def test_what_is_over_a_limit_is_missed(name: str, value: float) -> None:
    _, targets = compare(rows_of(**{name: value}))
    assert [target.is_met for target in targets if target.name == name] == [False]


def test_rows_count_after_the_warm_up_only() -> None:
    def chunks() -> object:
        for rows in itertools.chain([1_000, 1_000], itertools.repeat(10)):
            time.sleep(0.001)
            yield rows

    said = timed(chunks(), 1_500, 0.02)  # type: ignore[arg-type]
    assert 0 < said["rows"] <= 10 * 21
    assert said["rows"] % 10 == 0
    assert said["seconds"] >= 0.02
    assert said["end_s"] >= said["begin_s"]


@pytest.mark.parametrize("kind", ["numbers", "images", "wide", "small-files", "strings", "memory"])
def test_files_are_written_once_and_whole(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(data_files, "BUILD", tmp_path)
    files = Files(kind, 60, 2, 20, 0 if kind == "images" else 3)
    files.folder.mkdir()
    (files.folder / "00009.parquet").write_bytes(b"left by a run that was cut off")
    files.write()
    paths = sorted(files.folder.glob("*.parquet"))
    assert [path.name for path in paths] == ["00000.parquet", "00001.parquet"]
    for path in paths:
        footer = pq.read_metadata(path)
        assert [footer.row_group(g).num_rows for g in range(footer.num_row_groups)] == [20, 10]
        assert set(pq.read_schema(path).names) == set(files.column_names)
    before = paths[0].stat().st_mtime_ns
    files.write()
    assert paths[0].stat().st_mtime_ns == before
    assert json.loads((files.folder / "_ready.json").read_text())["rows"] == 60


def test_quick_runs_have_files_of_the_same_kinds() -> None:
    quick, whole = all_files(True), all_files(False)
    assert quick.keys() == whole.keys()
    for name, files in whole.items():
        assert files.rows % files.files == 0
        assert quick[name].rows < files.rows
        assert quick[name].features == files.features


def test_every_peer_has_a_program(monkeypatch) -> None:
    asked: list[str] = []

    def run(program: str, options: dict[str, object]) -> dict[str, float]:
        asked.append(program)
        json.dumps(options)
        return {"rows": 10, "seconds": 2.0, "begin_s": 0.0, "end_s": 2.0}

    monkeypatch.setattr("benchmarks.data._run", run)
    assert {peer.read().value for peer in Trials(False).peers()} == {5.0}
    assert set(asked) <= set(PEERS)
    assert len(set(asked)) >= 6


def test_quality_separates_the_kinds_of_shuffle() -> None:
    found = Trials(True).quality()
    spreads = [found[f"shuffle {kind}, spread of batch means|x"] for kind in ("none", "window")]
    assert spreads[0] > spreads[1]
    assert found["shuffle none, travel|x"] == 0
    assert np.isfinite(list(found.values())).all()


def test_the_planner_is_asked_for_any_step_of_any_worker() -> None:
    said = plan_at_scale(files=500)
    assert 0 < said["seek_ms"] <= said["slow_seek_ms"]
    assert said["plan_s"] > 0
