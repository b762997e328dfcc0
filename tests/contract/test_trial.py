"""The trial of artifacts: what the smoke test finds, and champions of other kinds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.features import InputColumn, InputLayout
from lockstep.hold_trial import evidence_of
from lockstep.trial import answer_to, main
from serving.errors import ModelFileError
from serving.evaluation import evaluate_files
from serving.predictor import load_predictor
from trainer.export import write_artifact

ROWS = 120
X = np.random.default_rng(3).normal(0, 1, (ROWS, 2)).astype("f4")
LAYOUT = InputLayout(
    (InputColumn("a", (), 0, False), InputColumn("b", (), 1, False)), "y", "float32", 1, None
)


def artifact(folder: Path, weights: tuple[float, float], layout: InputLayout = LAYOUT) -> Path:
    """A linear model of two columns with an L2 penalty, in all formats."""
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(1, use_bias=False, kernel_regularizer="l2")]
    )
    model.compile(loss="mse", metrics=["mae"])
    model.set_weights([np.array(weights, "f4")[:, None]])
    write_artifact(folder, model, layout, {}, has_h5=True, has_saved_model=True)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    artifact(folder / "good", (1.0, 2.0))
    artifact(folder / "bad", (1.0, -2.0))
    other = replace(LAYOUT, features=(*LAYOUT.features[:1], InputColumn("c", (), 1, False)))
    artifact(folder / "other", (1.0, 1.0), other)
    table = {"a": X[:, 0], "b": X[:, 1], "y": X @ np.array([1, 2], "f4"), "k": X[:, 0] > 0}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return folder


def request(models: Path, candidate: Path, **changes: Any) -> dict[str, Any]:
    return {
        "candidate": str(candidate),
        "champion": None,
        "champion_name": "flights/1",
        "evaluation": str(models / "rows.parquet"),
        "slice_rows": {"k": 10},
        "smoke_rows": 50,
        "tolerance": 1e-3,
        "has_own_code": False,
        "trained": {},
        **changes,
    }


def test_candidate_and_champion_are_measured_on_the_same_rows(models: Path, tmp_path: Path) -> None:
    answer, arrays = answer_to(
        request(models, models / "good", champion=str(models / "bad"), trained={"mae": 0.0})
    )
    assert answer["smoke"] == []
    assert answer["champion_problem"] == ""
    assert answer["candidate"]["metrics"]["mae"] == pytest.approx(0, abs=1e-5)
    expected = np.abs(4 * X[:, 1])
    assert answer["champion"]["metrics"]["mae"] == pytest.approx(expected.mean(), rel=1e-4)
    np.testing.assert_allclose(arrays["champion/mae"], expected, atol=1e-5)
    assert set(answer["candidate"]["slices"]["k"]) == {"False", "True"}
    assert set(answer["latency_ms"]) == {"one_row_ms", "thousand_rows_ms"}
    assert answer["size_bytes"] > 1_000
    np.savez(tmp_path / "rows.npz", **arrays)
    evidence = evidence_of(tmp_path, answer, "flights/1")
    assert evidence.champion is not None
    assert evidence.champion.name == "flights/1"
    np.testing.assert_array_equal(evidence.champion.rows["mae"], arrays["champion/mae"])
    assert evidence.slices["k"].values == ("False", "True")


def test_an_artifact_whose_formats_differ_fails(models: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(models / "good", mixed)
    shutil.rmtree(mixed / "saved_model")
    shutil.copytree(models / "bad" / "saved_model", mixed / "saved_model")
    (problem,) = answer_to(request(models, mixed))[0]["smoke"]
    assert problem.startswith("saved_model predicts ")


@pytest.mark.long
def test_an_artifact_of_which_a_format_is_broken_fails(models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models / "good", broken)
    (broken / "trained_model.h5").write_bytes(b"no model")
    (problem,) = answer_to(request(models, broken))[0]["smoke"]
    assert problem.startswith("trained_model.h5 cannot be served: ")
    # Of layers of the user's own only the SavedModel can be loaded everywhere.
    (broken / "model.keras").write_bytes(b"needs a class")
    assert answer_to(request(models, broken, has_own_code=True))[0]["smoke"] == []


@pytest.mark.long
def test_an_artifact_that_is_not_what_was_trained_fails(models: Path) -> None:
    (problem,) = answer_to(request(models, models / "good", trained={"mae": 0.5}))[0]["smoke"]
    assert "mae of the exported artifact is" in problem
    assert "gave 0.5" in problem


@pytest.mark.long
def test_a_loss_is_compared_with_its_penalty_where_there_is_no_metric(models: Path) -> None:
    penalty = 0.01 * (1.0 + 4.0)
    right = request(models, models / "good", trained={"loss": penalty})
    assert answer_to(right)[0]["smoke"] == []
    assert len(answer_to({**right, "trained": {"loss": 0.0}})[0]["smoke"]) == 1


@pytest.mark.long
def test_predictions_that_are_not_finite_fail(models: Path, tmp_path: Path) -> None:
    broken = artifact(tmp_path / "broken", (np.nan, 1.0))
    problems = answer_to(request(models, broken))[0]["smoke"]
    assert problems[0] == "model.keras predicts what is not finite in 120 of 120 rows"


def test_a_champion_of_other_columns_is_told_not_raised(models: Path) -> None:
    answer, _ = answer_to(request(models, models / "good", champion=str(models / "other")))
    assert answer["champion"] is None
    assert answer["champion_problem"].startswith("flights/1 cannot be evaluated on these rows: ")
    assert "'c'" in answer["champion_problem"]


def classifier(folder: Path, classes: int, words: int = 0) -> Path:
    """A model of whole-number classes; with words, of one column that an Embedding looks up."""
    layers = [keras.layers.Embedding(words, 3), keras.layers.Flatten()] if words else []
    model = keras.Sequential(
        [keras.Input((1 if words else 2,)), *layers, keras.layers.Dense(classes, "softmax")]
    )
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    features = LAYOUT.features[:1] if words else LAYOUT.features
    layout = replace(LAYOUT, features=features, label_dtype="int64")
    write_artifact(folder, model, layout, {}, has_h5=False, has_saved_model=False)
    return folder


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of four classes and of eight words."""
    folder = tmp_path_factory.mktemp("grown")
    numbers = np.arange(ROWS)
    table = {"a": (numbers % 8).astype("f4"), "b": X[:, 1], "y": numbers % 4, "k": numbers > 9}
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return folder


def test_a_champion_that_lacks_a_class_keeps_its_place(grown: Path, tmp_path: Path) -> None:
    candidate, champion = classifier(tmp_path / "4", 4), classifier(tmp_path / "3", 3)
    answer, _ = answer_to(request(grown, candidate, champion=str(champion)))
    assert answer["champion"] is None
    assert answer["champion_problem"].startswith("flights/1 cannot be evaluated on these rows: ")
    assert "outside the valid range of [0, 3)" in answer["champion_problem"]
    assert answer["candidate"]["metrics"]["accuracy"] >= 0


def test_a_champion_that_lacks_a_word_keeps_its_place(grown: Path, tmp_path: Path) -> None:
    candidate, champion = classifier(tmp_path / "8", 4, 8), classifier(tmp_path / "5", 4, 5)
    answer, _ = answer_to(request(grown, candidate, champion=str(champion)))
    assert answer["champion"] is None
    assert "is not in [0, 5)" in answer["champion_problem"]


@pytest.mark.parametrize(("classes", "words"), [(3, 0), (4, 5)])
def test_a_candidate_that_cannot_be_judged_is_an_answer(
    grown: Path, tmp_path: Path, classes: int, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.trial._end_with_parent", lambda: None)  # it would end this one
    asked = request(grown, classifier(tmp_path / "m", classes, words))
    (tmp_path / "request.json").write_text(json.dumps(asked))
    main(tmp_path)
    answer = json.loads((tmp_path / "trial.json").read_text())
    assert answer["exit_status"] == 2
    assert f"[0, {words or classes})" in answer["error"]


@pytest.mark.parametrize(("classes", "words"), [(3, 0), (4, 5)])
def test_evaluate_explains_what_a_model_cannot_know(
    grown: Path, tmp_path: Path, classes: int, words: int
) -> None:
    predictor = load_predictor(classifier(tmp_path / "m", classes, words))
    with pytest.raises(ModelFileError, match=rf"\[0, {words or classes}\)"):
        evaluate_files(predictor, str(grown / "rows.parquet"))
