"""Job files: what loads, and each kind of mistake with its line and its exact text."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.catalog import catalog
from configs.errors import JobError, UserError
from configs.load import differing_fields, dump_job, job_digest, load_job
from configs.schema import Job

CONFIGS = Path(__file__).parents[2] / "configs"

TEXT = """\
name: delays
model:
  layers:
    - Dense: {units: 8, activation: relu}
    - Dropout: {rate: 0.1}
    - Dense: {units: 1}
compile:
  optimizer: adam
  loss: mse
  metrics: [mae]
data:
  train: data/train
  features:
    - distance
    - {name: image, shape: [8, 8]}
  label: delay
train:
  epochs: 3
  global_batch_size: 64
  callbacks:
    - EarlyStopping: {patience: 2}
cluster:
  workers: 2
"""

SECTIONS = "name, model, compile, data, train, cluster, checkpoint, export, tracking, runs_dir"
TRAIN_KEYS = (
    "epochs, global_batch_size, seed, callbacks, class_weight, sync_batch_norm, max_time_s, "
    "validation_freq, steps_per_execution, jit_compile, reduce_dtype, dtype_policy"
)


def loaded(folder: Path, text: str = TEXT, *overrides: str) -> Job:
    path = folder / "job.yaml"
    path.write_text(text)
    return load_job(path, overrides)


def changed(old: str, new: str) -> str:
    if TEXT.count(old) != 1:
        raise AssertionError(f"{old!r} stands {TEXT.count(old)} times")
    return TEXT.replace(old, new)


def mistake(folder: Path, text: str, *overrides: str) -> str:
    """The message, with the folder of the file cut off."""
    with pytest.raises(UserError) as error:
        loaded(folder, text, *overrides)
    assert error.value.exit_status == 2
    return str(error.value).replace(f"{folder}/", "")


JOBS = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.endswith("-retrain")]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_file_that_is_shipped_loads(path):
    assert load_job(path).name == path.stem


def test_there_are_shipped_job_files():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {"flights", "digits", "weather"}


MISTAKES = {
    "unknown key": (
        ("epochs: 3", "epocs: 3"),
        "job.yaml:17: train.epochs is missing. Add it.\n"
        f"job.yaml:18: unknown key train.epocs; allowed here: {TRAIN_KEYS}. Did you mean 'epochs'?",
    ),
    "unknown key with a hyphen": (
        ("  epochs: 3", "  epochs: 3\n  steps-per-execution: 2"),
        "job.yaml:19: unknown key train.steps-per-execution; allowed here: "
        f"{TRAIN_KEYS}. Did you mean 'steps_per_execution'?",
    ),
    "unknown key at the top": (
        ("cluster:", "runs-dir: x\ncluster:"),
        f"job.yaml:22: unknown key runs-dir; allowed here: {SECTIONS}. Did you mean 'runs_dir'?",
    ),
    "unknown key like nothing": (
        ("cluster:", "x: 1\ncluster:"),
        f"job.yaml:22: unknown key x; allowed here: {SECTIONS}.",
    ),
    "unknown key called str": (
        ("  epochs: 3", "  epochs: 3\n  str: 2"),
        f"job.yaml:19: unknown key train.str; allowed here: {TRAIN_KEYS}.",
    ),
    "unknown key of a feature": (
        ("shape: [8, 8]", "shpe: [8, 8]"),
        "job.yaml:15: unknown key data.features.1.shpe; allowed here: name, kind, shape, "
        "normalize, vocabulary_size, encoding, embedding_size, sequence_length, parts, cyclic. Did "
        "you mean 'shape'?",
    ),
    "key that is no text": (
        ("  epochs: 3", "  epochs: 3\n  5: 2"),
        "job.yaml:17: train.5: received 5; allowed: keys should be strings. Change train.5.",
    ),
    "the same key twice": (
        ("  global_batch_size: 64", "  global_batch_size: 64\n  epochs: 5"),
        "job.yaml:20: train.epochs stands here and in line 18; each key once is allowed. Remove "
        "one.",
    ),
    "unknown layer": (
        ("- Dense: {units: 1}", "- dense: {units: 1}"),
        "job.yaml:6: model.layers.2: unknown layer 'dense'; any of keras.layers is allowed. Did "
        "you mean 'Dense'?",
    ),
    "unknown layer like nothing": (
        ("- Dense: {units: 1}", "- Qqqqq"),
        "job.yaml:6: model.layers.2: unknown layer 'Qqqqq'; any of keras.layers is allowed.",
    ),
    "unknown loss": (
        ("loss: mse", "loss: mean_squared_eror"),
        "job.yaml:9: compile.loss: unknown loss 'mean_squared_eror'; any of keras.losses is "
        "allowed. Did you mean 'mean_squared_error'?",
    ),
    "unknown metric": (
        ("metrics: [mae]", "metrics: [mae, acuracy]"),
        "job.yaml:10: compile.metrics.1: unknown metric 'acuracy'; any of keras.metrics is "
        "allowed. Did you mean 'accuracy'?",
    ),
    "unknown optimizer": (
        ("optimizer: adam", "optimizer: {Adamm: {learning_rate: 0.1}}"),
        "job.yaml:8: compile.optimizer: unknown optimizer 'Adamm'; any of keras.optimizers is "
        "allowed. Did you mean 'Adam'?",
    ),
    "unknown callback": (
        ("EarlyStopping: {", "EarlyStoping: {"),
        "job.yaml:21: train.callbacks.0: unknown callback 'EarlyStoping'; any of keras.callbacks "
        "is allowed. Did you mean 'EarlyStopping'?",
    ),
    "unknown schedule inside an optimizer": (
        (
            "optimizer: adam",
            "optimizer: {Adam: {learning_rate: {CosineDecay: {initial_learning_rate: 0.1, "
            "decay_step: 9}}}}",
        ),
        "job.yaml:8: compile.optimizer: CosineDecay has no argument 'decay_step'; allowed: "
        f"{', '.join(catalog()['schedules']['classes']['CosineDecay']['arguments'])}. Did you "
        "mean 'decay_steps'?",
    ),
    "unknown argument": (
        ("Dropout: {rate: 0.1}", "Dropout: {rat: 0.1}"),
        "job.yaml:5: model.layers.1: Dropout has no argument 'rat'; allowed: "
        f"{', '.join(catalog()['layers']['classes']['Dropout']['arguments'])}. Did you mean "
        "'rate'?",
    ),
    "missing argument": (
        ("- Dense: {units: 1}", "- Dense"),
        "job.yaml:6: model.layers.2: Dense needs units. Write Dense: {units: ...}.",
    ),
    "missing arguments": (
        ("- Dense: {units: 1}", "- Conv2D:"),
        "job.yaml:6: model.layers.2: Conv2D needs filters and kernel_size. Write Conv2D: "
        "{filters: ...}.",
    ),
    "arguments that are no mapping": (
        ("- Dense: {units: 1}", "- Dense: 1"),
        "job.yaml:6: model.layers.2: received Dense: 1; the arguments of Dense are a mapping, "
        "such as Dense: {argument: value}. Name the argument.",
    ),
    "two names in one entry": (
        ("- Dense: {units: 1}", "- {Dense: {units: 1}, ReLU: {}}"),
        "job.yaml:6: model.layers.2: received {'Dense': {'units': 1}, 'ReLU': {}}; a name, or a "
        "mapping of one name to its arguments, is allowed. Check the indentation.",
    ),
    "arguments for an alias": (
        ("optimizer: adam", "optimizer: {adam: {learning_rate: 0.1}}"),
        "job.yaml:8: compile.optimizer: received arguments for 'adam', which is an alias; "
        "arguments need the class name. Did you mean 'Adam'?",
    ),
    "wrong type": (
        ("epochs: 3", "epochs: many"),
        "job.yaml:18: train.epochs: received 'many'; allowed: a valid integer, unable to parse "
        "string as an integer. Change train.epochs.",
    ),
    "a fraction for a whole number": (
        ("epochs: 3", "epochs: 1.5"),
        "job.yaml:18: train.epochs: received 1.5; allowed: a valid integer, got a number with a "
        "fractional part. Change train.epochs.",
    ),
    "out of range": (
        ("epochs: 3", "epochs: 0"),
        "job.yaml:18: train.epochs: received 0; allowed: greater than or equal to 1. Change "
        "train.epochs.",
    ),
    "not one of the words": (
        ("label: delay", "label: delay\n  shuffle: windows"),
        "job.yaml:17: data.shuffle: received 'windows'; allowed: 'none', 'window' or 'full'. "
        "Change data.shuffle.",
    ),
    "a word for a section": (
        ("cluster:\n  workers: 2", "cluster: two"),
        "job.yaml:22: cluster: received 'two'; allowed: a mapping. Change cluster.",
    ),
    "a number for a feature": (
        ("    - distance", "    - 5"),
        "job.yaml:14: data.features.0: received 5; allowed: a mapping. Change data.features.0.",
    ),
    "no layers": (
        (TEXT[TEXT.index("  layers:") : TEXT.index("compile:")], "  layers: []\n"),
        "job.yaml:3: model.layers: received []; allowed: list should have at least 1 item after "
        "validation, not 0. Change model.layers.",
    ),
    "a name that cannot be a folder": (
        ("name: delays", "name: ../delays"),
        "job.yaml:1: name: received '../delays'; allowed: string should match pattern "
        "'^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'. Change name.",
    ),
    "missing section": (
        (TEXT[TEXT.index("train:\n") :], ""),
        "job.yaml: train is missing. Add it.",
    ),
    "missing field": (
        ("  label: delay\n", ""),
        "job.yaml:11: data.label is missing. Add it.",
    ),
    "missing loss": (
        ("  loss: mse\n", ""),
        "job.yaml:7: compile.loss is missing. Add it.",
    ),
    "layers without compile": (
        (TEXT[TEXT.index("compile:") : TEXT.index("data:")], ""),
        "job.yaml: compile is missing; layers need at least compile.loss. Add compile.",
    ),
    "two sources of the model": (
        ("model:\n", "model:\n  builder: models:build\n"),
        "job.yaml:2: model: received layers and builder; exactly one of layers, builder and file "
        "describes the model. Keep one of them.",
    ),
    "no source of the model": (
        (TEXT[TEXT.index("  layers:") : TEXT.index("compile:")], "  layers: null\n"),
        "job.yaml:2: model: received no source of the model; exactly one of layers, builder and "
        "file describes the model. Keep one of them.",
    ),
    "a feature twice": (
        ("    - distance", "    - distance\n    - {name: distance}"),
        "job.yaml:13: data.features: received ['distance'] more than once. Name each column once.",
    ),
    "the label among the features": (
        ("    - distance", "    - delay"),
        "job.yaml:11: data: column 'delay' is both label and feature; it can be one of them. Take "
        "it out of features.",
    ),
    "the weight among the features": (
        ("  label: delay", "  label: delay\n  weight: distance"),
        "job.yaml:11: data: column 'distance' is both weight and feature; it can be one of them. "
        "Take it out of features.",
    ),
    "the label as weight": (
        ("  label: delay", "  label: delay\n  weight: delay"),
        "job.yaml:11: data: column 'delay' is both label and weight. Name two columns.",
    ),
    "batch smaller than workers": (
        ("global_batch_size: 64", "global_batch_size: 1"),
        "job.yaml: train.global_batch_size=1 is smaller than cluster.workers=2: some workers "
        "would never have a row. Set train.global_batch_size to 2 or more, or use fewer workers.",
    ),
    "more workers than virtual shards": (
        ("workers: 2", "workers: 24"),
        "job.yaml: data.virtual_shards=16 cannot feed 24 workers: each worker needs at least one. "
        "Set data.virtual_shards to 24 or more, or cluster.workers to 16 or fewer.",
    ),
    "a window without window shuffling": (
        ("  label: delay", "  label: delay\n  shuffle: none\n  window_rows: 9"),
        "job.yaml:11: data: window_rows=9 has no effect with shuffle: none. Remove window_rows or "
        "set shuffle: window.",
    ),
    "a reduce type without other workers": (
        (TEXT[TEXT.index("  callbacks:") :], "  reduce_dtype: bfloat16\n"),
        "job.yaml: train.reduce_dtype=bfloat16 has no effect with one worker. Remove it, or set "
        "cluster.workers to 2 or more.",
    ),
    "weights of rows and of classes": (
        (
            "  label: delay\ntrain:",
            "  label: delay\n  weight: w\ntrain:\n  class_weight: {0: 1, 1: 2}",
        ),
        "job.yaml: train.class_weight and data.weight=w both weigh rows; one of them is allowed. "
        "Multiply the class weights into the column.",
    ),
    "a class below zero": (
        ("  epochs: 3", "  epochs: 3\n  class_weight: {-1: 2}"),
        "job.yaml: train.class_weight names class -1; classes count from 0. Remove it.",
    ),
    "virtual devices beside GPUs": (
        ("  workers: 2", "  workers: 2\n  gpus_per_worker: 1\n  cpu_devices_per_worker: 2"),
        "job.yaml: cluster.cpu_devices_per_worker=2 has no effect with GPUs. Remove it, or set "
        "cluster.gpus_per_worker to 0.",
    ),
    "validation now and then without any": (
        ("  epochs: 3", "  epochs: 3\n  validation_freq: 2"),
        "job.yaml: train.validation_freq=2 has no effect without data.validation. Remove it, or "
        "name validation files.",
    ),
    "arguments without a builder": (
        ("model:\n", "model:\n  arguments: {width: 3}\n"),
        "job.yaml:2: model: arguments has no effect without builder. Remove arguments.",
    ),
    "YAML that is none": (
        ("  metrics: [mae]", "  metrics: [mae"),
        "job.yaml:11: not valid YAML: expected ',' or ']', but got ':'. Correct the line.",
    ),
    "YAML with a wrong indentation": (
        ("  label: delay", "   label: delay"),
        "job.yaml:16: not valid YAML: expected <block end>, but found '<block mapping start>'. "
        "Correct the line.",
    ),
    "a date that no calendar has": (
        ("name: delays", "name: 2013-13-45"),
        "job.yaml:1: not valid YAML: '2013-13-45' is no timestamp (month must be in 1..12); a text "
        "stands in quotes. Correct the line.",
    ),
    "a number of no digits": (
        ("  epochs: 3", "  epochs: 0x_"),
        "job.yaml:18: not valid YAML: '0x_' is no int (invalid literal for int() with base 16: "
        "''); a text stands in quotes. Correct the line.",
    ),
    "a tag that does not fit": (
        ("name: delays", "name: !!timestamp soon"),
        "job.yaml:1: not valid YAML: 'soon' is no timestamp; a text stands in quotes. Correct "
        "the line.",
    ),
    "a value without end": (
        ("  metrics: [mae]", "  metrics: " + "[" * 3000 + "]" * 3000),
        "job.yaml: not valid YAML: it is nested too deeply. Correct the line.",
    ),
    "a value that holds itself": (
        ("  metrics: [mae]", "  metrics: &all [*all]"),
        "job.yaml: an alias (*) stands inside of what it names; values that end are allowed. Write "
        "the value out.",
    ),
    "YAML that wants to run code": (
        ("name: delays", "name: !!python/object/apply:os.getcwd []"),
        "job.yaml:1: not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.getcwd'. Correct the line.",
    ),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_with_its_line(tmp_path, case):
    change, message = case
    assert mistake(tmp_path, changed(*change)) == message


def test_several_mistakes_are_told_at_once(tmp_path):
    text = changed("epochs: 3", "epochs: 0").replace("loss: mse", "loss: msee")
    assert mistake(tmp_path, text) == (
        "job.yaml:9: compile.loss: unknown loss 'msee'; any of keras.losses is allowed. Did you "
        "mean 'mse'?\n"
        "job.yaml:18: train.epochs: received 0; allowed: greater than or equal to 1. Change "
        "train.epochs."
    )


@pytest.mark.parametrize(
    ("text", "received"),
    [("", "nothing"), ("# a comment\n", "nothing"), ("- a\n- b\n", "list"), ("job", "str")],
)
def test_a_file_that_holds_no_mapping(tmp_path, text, received):
    assert mistake(tmp_path, text) == (
        f"job.yaml: received {received}; a mapping with name, model, data and train is allowed. "
        "See `lockstep schema`."
    )


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path):
    (tmp_path / "flights.yaml").write_text(TEXT)
    with pytest.raises(JobError) as error:
        load_job(tmp_path / "flight.yaml")
    assert str(error.value) == (
        f"no job file at {tmp_path}/flight.yaml; the path of a YAML file is needed. Did you mean "
        "'flights.yaml'?"
    )
    with pytest.raises(JobError) as error:
        load_job(tmp_path / "no" / "such" / "job.yaml")
    assert str(error.value) == (
        f"no job file at {tmp_path}/no/such/job.yaml; the path of a YAML file is needed."
    )


def test_a_folder_is_no_job_file(tmp_path):
    with pytest.raises(JobError) as error:
        load_job(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path} is a folder; a job file is allowed. Name the YAML file in it."
    )


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "model.h5"
    path.write_bytes(b"\x89HDF\xff\x00")
    with pytest.raises(JobError) as error:
        load_job(path)
    assert str(error.value) == (
        f"cannot read {path}: 'utf-8' codec can't decode byte 0x89 in position 0: invalid start "
        "byte. A text file in YAML is allowed."
    )


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(JobError, match=r"cannot read .*Permission denied.*A text file in YAML is"):
        load_job(tmp_path / "job.yaml")


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    job = loaded(tmp_path, TEXT, "train.seed=5", "train.epochs=9", "train.epochs=10")
    assert (job.train.seed, job.train.epochs, job.cluster.workers) == (5, 10, 2)
    assert loaded(tmp_path).train.epochs == 3
    assert loaded(tmp_path).train.seed == 0
    assert loaded(tmp_path, TEXT.replace("cluster:\n  workers: 2\n", "")).cluster.workers == 1


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("data.validation=data/later", "data", "validation", "data/later"),
        ("data.validation=null", "data", "validation", None),
        ("data.train=[a, b]", "data", "train", ["a", "b"]),
        ("data.train=a=b", "data", "train", "a=b"),
        ("data.normalize=true", "data", "normalize", True),
        ("checkpoint.every_steps=7", "checkpoint", "every_steps", 7),
        ("cluster={workers: 4}", "cluster", "workers", 4),
        ("cluster.stall_after_s=1e2", "cluster", "stall_after_s", 100.0),
        (
            "compile.optimizer={Adam: {learning_rate: 1e-3}}",
            *("compile", "optimizer", {"Adam": {"learning_rate": 0.001}}),
        ),
    ],
)
def test_values_of_overrides_are_yaml(tmp_path, override, section, field, value):
    job = loaded(tmp_path, TEXT, override)
    assert getattr(getattr(job, section), field) == value


SET_FORM = "; the form a.b=value is allowed, such as --set train.epochs=5."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", f"--set received 'train.epochs'{SET_FORM}"),
        ("=5", f"--set received '=5'{SET_FORM}"),
        ("train.epochs=[1", "--set train.epochs=[1: '[1' is not valid YAML. Quote the value."),
        (
            "name=2013-13-45",
            "--set name=2013-13-45: '2013-13-45' is not valid YAML. Quote the value.",
        ),
        (
            "name.first=x",
            "--set name.first=x: name holds 'delays', not fields. Set name whole.",
        ),
        (
            "model.layers.0={Dense: {units: 2}}",
            "--set model.layers.0={Dense: {units: 2}}: model.layers holds [{'Dense': {'units': 8, "
            "'activation': 'relu'}}, {'Dropout': {'rate': 0.1}}, {'Dense': {'units': 1}}], not "
            "fields. Set model.layers whole.",
        ),
        (
            "train.epochs=many",
            "--set: train.epochs: received 'many'; allowed: a valid integer, unable to parse "
            "string as an integer. Change train.epochs.",
        ),
        (
            "train.epocs=5",
            f"--set: unknown key train.epocs; allowed here: {TRAIN_KEYS}. Did you mean 'epochs'?",
        ),
        (
            "trian.epochs=5",
            f"--set: unknown key trian; allowed here: {SECTIONS}. Did you mean 'train'?",
        ),
        (
            "train={epochs: 2}",
            "--set: train.global_batch_size is missing. Add it.",
        ),
        (
            "cluster.workers=24",
            "job.yaml: data.virtual_shards=16 cannot feed 24 workers: each worker needs at least "
            "one. Set data.virtual_shards to 24 or more, or cluster.workers to 16 or fewer.",
        ),
    ],
)
def test_a_bad_override_is_told(tmp_path, override, message):
    assert mistake(tmp_path, TEXT, override) == message


def test_a_mistake_beside_an_override_keeps_its_line(tmp_path):
    text = changed("epochs: 3", "epochs: 0")
    message = mistake(tmp_path, text, "train.seed=3", "checkpoint.keep=5")
    assert message.startswith("job.yaml:18: train.epochs: received 0;")


def test_a_mapping_and_a_job_load_too_and_stay_as_they_are():
    values = yaml.safe_load(TEXT)
    job = load_job(values, ["train.epochs=4", "compile.loss=mae"])
    assert (job.train.epochs, job.compile and job.compile.loss) == (4, "mae")
    assert values == yaml.safe_load(TEXT)
    again = load_job(job, ["cluster.workers=1"])
    assert (again.cluster.workers, job.cluster.workers) == (1, 2)
    assert load_job(job) == job
    with pytest.raises(JobError, match=r"^job: train\.epochs: received 0; allowed: greater"):
        load_job({**values, "train": {"epochs": 0, "global_batch_size": 2}})


def test_a_job_is_frozen():
    job = load_job(yaml.safe_load(TEXT))
    with pytest.raises(ValueError, match="frozen"):
        job.train.epochs = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-1E5", -1e5),
        ("2.e+3", 2000.0),
        (".5e1", 5.0),
        ("1.5e-3", 0.0015),
        ("'1e-3'", "1e-3"),
        ("e3", "e3"),
        ("1e", "1e"),
        ("0x1e3", 0x1E3),
        ("12", 12),
    ],
)
def test_numbers_with_an_exponent_are_numbers(tmp_path, text, value):
    """PyYAML alone reads 1e-3 as text, which Keras refuses as a learning rate."""
    job = loaded(tmp_path, changed("patience: 2", f"min_delta: {text}"))
    found = job.train.callbacks[0]
    assert found == {"EarlyStopping": {"min_delta": value}}
    assert load_text(tmp_path, dump_job(job)) == job


def test_own_code_is_left_to_those_who_load_it(tmp_path):
    text = changed("    - Dropout: {rate: 0.1}", "    - layers.py:Mine: {anything: 1}")
    assert loaded(tmp_path, text).model.layers is not None
    text = changed("  loss: mse", "  loss: my.losses:Mine")
    assert loaded(tmp_path, text).compile is not None


def load_text(folder: Path, text: str) -> Job:
    path = folder / "dumped.yaml"
    path.write_text(text)
    return load_job(path)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["1e-3", "1e3", "yes", "null", "~", "0x1", "1_000", "2020-01-01", "a: b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=12, deadline=None)
@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True),
    arguments=st.dictionaries(st.text(max_size=6), plain, max_size=3),
    features=st.lists(st.text(max_size=6), min_size=1, max_size=3, unique=True),
    shape=st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 2**31 - 1),
    timeout_s=st.floats(1e-6, 1e9),
    paths=st.text(max_size=9) | st.lists(st.text(max_size=9), max_size=3),
)
def test_a_job_survives_being_written_down(
    tmp_path_factory, name, arguments, features, shape, seed, timeout_s, paths
):
    job = load_job(
        {
            "name": name,
            "model": {"builder": "models:build", "arguments": arguments},
            "data": {
                "train": paths,
                "features": [{"name": feature, "shape": shape} for feature in features],
                "label": "the label",
            },
            "train": {"epochs": 1, "global_batch_size": 2, "seed": seed},
            "cluster": {"start_timeout_s": timeout_s},
        }
    )
    again = load_text(tmp_path_factory.getbasetemp(), dump_job(job))
    assert again == job
    assert job_digest(again) == job_digest(job)
    assert differing_fields(again, job) == []


def with_argument(value: Any) -> Job:
    values = yaml.safe_load(TEXT)
    values["compile"]["optimizer"] = {"Adam": {"learning_rate": value}}
    return load_job(values)


def test_keys_of_two_types_are_two_keys(tmp_path):
    text = changed(
        "model:\n", "model:\n  arguments: {of: {0: a, '0': b}}\n  builder: models:build\n"
    )
    layers = TEXT[TEXT.index("  layers:") : TEXT.index("compile:")]
    job = loaded(tmp_path, text.replace(layers, ""))
    assert job.model.arguments == {"of": {0: "a", "0": "b"}}


def test_values_made_in_python_are_written_as_what_they_are(tmp_path):
    assert load_text(tmp_path, dump_job(with_argument(np.float64(0.1)))) == with_argument(0.1)
    assert load_text(tmp_path, dump_job(with_argument((1, 2)))) == with_argument([1, 2])
    assert load_text(tmp_path, dump_job(with_argument(math.inf))) == with_argument(math.inf)


def test_an_object_in_a_job_is_refused():
    with pytest.raises(JobError) as error:
        dump_job(with_argument(np.float32(0.5)))
    assert str(error.value) == (
        "received np.float32(0.5) in the job; numbers, texts, booleans, and lists and mappings of "
        "them are allowed. Pass a plain value, and make the object from it in the builder."
    )


@pytest.mark.parametrize(
    ("override", "fields"),
    [
        ("train.seed=1", ["train.seed"]),
        ("data.label=other", ["data.label"]),
        ("compile.optimizer={Adam: {learning_rate: 0.1}}", ["compile.optimizer"]),
        ("data.features=[distance]", ["data.features"]),
        ("name=other", ["name"]),
        ("model={file: m.keras}", ["model.file", "model.layers"]),
        ("train.epochs=30", []),
        ("train.steps_per_execution=4", []),
        ("cluster.workers=4", []),
        ("checkpoint.keep=9", []),
        ("export.h5=false", []),
        ("runs_dir=elsewhere", []),
    ],
)
def test_jobs_differ_in_what_earlier_steps_depended_on(tmp_path, override, fields):
    job, other = loaded(tmp_path), loaded(tmp_path, TEXT, override)
    assert other != job
    assert differing_fields(job, other) == differing_fields(other, job) == fields
    assert (job_digest(job) == job_digest(other)) == (fields == [])


def test_the_digest_does_not_depend_on_how_a_job_is_written():
    values = yaml.safe_load(TEXT)
    backwards = dict(reversed(values.items())) | {"train": dict(reversed(values["train"].items()))}
    spelt_out = {**values, "runs_dir": "runs", "export": {"h5": True}}
    digests = {job_digest(load_job(written)) for written in (values, backwards, spelt_out)}
    assert len(digests) == 1
    assert len(digests.pop()) == 16
