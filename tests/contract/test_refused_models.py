"""Files that could run code, reach out of themselves, or grow out of proportion are refused."""

import json
import re
import stat
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

from trainer.errors import ImportRefused
from trainer.graph_safety import FORBIDDEN, check_saved_model
from trainer.safety import check_config, check_h5, unpack_archive

LIMIT = 50_000_000


def layer(class_name, module="keras.layers", **config):
    entry = {"module": module, "class_name": class_name, "config": config}
    return {"class_name": "Sequential", "module": "keras", "config": {"layers": [entry]}}


@pytest.mark.parametrize(
    "described",
    [
        layer("Dense", units=3, activation="relu"),
        layer(
            "Dense", activation={"class_name": "function", "module": "builtins", "config": "relu"}
        ),
        layer("GetItem", module="keras.src.ops.numpy", name="x"),
        layer("Dense", kernel_initializer={"module": "keras.initializers", "class_name": "Zeros"}),
        layer("Dense", dtype={"module": "keras", "class_name": "DTypePolicy", "config": {}}),
        layer("StringLookup", vocabulary=["a", "b"]),
    ],
)
def test_what_is_kerass_own_is_allowed(described):
    check_config(described)


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        (layer("Lambda", function={"class_name": "__lambda__"}), "runs a function"),
        (layer("TFSMLayer", filepath="/x"), "loads another file"),
        (layer("TorchModuleWrapper", module="x"), "unpickles"),
        (layer("Dense", activation={"class_name": "__lambda__", "config": {}}), "a function"),
        (layer("system", module="os"), "code of its author"),
        (layer("Dense", module="evil.layers"), "code of its author"),
        (layer("Dense", module="keras_evil"), "code of its author"),
        (layer("get_file", module="keras.utils"), "code of its author"),
        (layer("run", module="keras.src.ops.numpy.os:x"), "code of its author"),
        (layer("MyLayer", module=None), "no class of Keras"),
        (
            {"class_name": "Dense", "module": None, "registered_name": "my_package>Dense"},
            "code of its author",
        ),
        (layer("StringLookup", vocabulary="/etc/passwd"), "reads its vocabulary"),
        ({"class_name": "function", "module": "builtins", "config": {"code": "x"}}, "a function"),
        ({"class_name": "function", "module": "builtins", "config": "eval"}, "a function"),
        (layer("eval", module="builtins"), "no class of Keras"),
        (layer("os", module="keras.src.ops.numpy"), "no class of Keras"),
    ],
)
def test_what_could_run_code_or_read_files_is_refused(described, reason):
    with pytest.raises(ImportRefused, match=reason):
        check_config(described)


def test_a_configuration_without_end_is_refused():
    value: dict = {}
    for _ in range(1000):
        value = {"config": value}
    with pytest.raises(ImportRefused, match="nested too deeply"):
        check_config(value)


def archive(path, entries, **details):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in entries:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            for key, value in details.items():
                setattr(entry, key, value)
            opened.writestr(entry, content)
    return path


@pytest.mark.parametrize(
    ("entries", "details", "reason"),
    [
        ([("config.json", "{}"), ("../outside.json", "{}")], {}, "reaches out"),
        ([("config.json", "{}"), ("assets/../../x", "{}")], {}, "reaches out"),
        ([("/config.json", "{}")], {}, "reaches out"),
        ([("config.json", "{}")], {"external_attr": (stat.S_IFLNK | 0o777) << 16}, "reaches out"),
        ([("config.json", "{}"), ("run.py", "x")], {}, "no .keras file has"),
        ([("config.json", "{}"), ("model.weights.h5", b"\0" * LIMIT)], {}, "unpacks to"),
        ([("metadata.json", "{}")], {}, "no config.json"),
    ],
)
def test_archives_that_reach_out_or_blow_up_are_refused(tmp_path, entries, details, reason):
    path = archive(tmp_path / "m.keras", entries, **details)
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(ImportRefused, match=reason):
        unpack_archive(path, inside, 2 * LIMIT)
    assert list(inside.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_a_name_twice_is_refused(tmp_path):
    path = archive(tmp_path / "m.keras", [("config.json", "{}"), ("config.json", "[]")])
    with pytest.raises(ImportRefused, match="twice"):
        unpack_archive(path, tmp_path, LIMIT)


def test_a_cut_off_archive_is_refused(tmp_path):
    path = archive(tmp_path / "m.keras", [("config.json", json.dumps({"a": "b" * 999}))])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ImportRefused, match="no whole"):
        unpack_archive(path, tmp_path, LIMIT)


def test_hdf5_files_that_reach_out_or_blow_up_are_refused(tmp_path):
    def made(name, write):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            write(file)
        return path

    def external(file):
        file["x"] = h5py.ExternalLink("/etc/hostname", "/")

    def soft(file):
        file.create_group("g")["x"] = h5py.SoftLink("/y")

    def elsewhere(file):
        file.create_dataset("x", (4,), "u1", external=[("/etc/hostname", 0, 4)])

    def huge(file):
        file.create_dataset("x", (2**40,), "f4", chunks=(1024,))

    for write, reason in [
        (external, "link to elsewhere"),
        (soft, "link to elsewhere"),
        (elsewhere, "lies in another file"),
        (huge, "arrays of huge"),
    ]:
        with pytest.raises(ImportRefused, match=reason):
            check_h5(made(f"{write.__name__}.h5", write), LIMIT)
    check_h5(made("good.h5", lambda file: file.create_dataset("x", data=np.ones(9))), LIMIT)
    (tmp_path / "cut.h5").write_bytes((tmp_path / "good.h5").read_bytes()[:700])
    with pytest.raises(ImportRefused, match="cannot be read"):
        check_h5(tmp_path / "cut.h5", LIMIT)


def test_a_saved_model_keeps_to_its_tensors(tmp_path):
    def saved(name, function):
        module = tf.Module()
        module.f = tf.function(function, input_signature=[tf.TensorSpec((None, 2), tf.float32)])
        tf.saved_model.save(module, str(tmp_path / name), signatures=module.f)
        return tmp_path / name

    def writes(x):
        tf.io.write_file("/tmp/never", "x")
        return 2 * x

    def reads(x):
        return x + tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32)

    def python(x):
        return tf.ensure_shape(tf.numpy_function(lambda value: value, [x], tf.float32), (None, 2))

    def branches(x):  # operations inside of branches are seen, too
        return tf.cond(tf.reduce_sum(x) > 0, lambda: reads(x), lambda: x)

    check_saved_model(saved("good", lambda x: 2 * x), False)
    for function, operation in [
        (writes, "WriteFile"),
        (reads, "ReadFile"),
        (python, "PyFunc"),
        (branches, "ReadFile"),
    ]:
        folder = saved(function.__name__, function)
        with pytest.raises(ImportRefused, match=operation):
            check_saved_model(folder, False)
        check_saved_model(folder, True)
    (tmp_path / "good" / "assets" / "x").symlink_to("/etc/hostname")
    with pytest.raises(ImportRefused, match="is a link"):
        check_saved_model(tmp_path / "good", True)


def test_operations_that_read_what_an_attribute_names_are_refused(tmp_path):
    def proto(x):
        text = tf.strings.as_string(x[:, 0])
        _, (value,) = tf.io.decode_proto(text, "M", ["f"], [tf.float32], "/etc/hostname")
        return value

    def record(x):
        tf.raw_ops.RecordInput(file_pattern="/etc/host*")
        return x

    def sample(x):
        tf.random.fixed_unigram_candidate_sampler(
            [[0]], 1, 1, unique=True, range_max=1, vocab_file="/etc/hostname"
        )
        return x

    for function, operation in [
        (proto, "DecodeProtoV2"),
        (record, "RecordInput"),
        (sample, "FixedUnigramCandidateSampler"),
    ]:
        module = tf.Module()
        module.f = tf.function(function, input_signature=[tf.TensorSpec((None, 2), tf.float32)])
        tf.saved_model.save(module, str(tmp_path / operation), signatures=module.f)
        with pytest.raises(ImportRefused, match=operation):
            check_saved_model(tmp_path / operation, False)


# What remains of operations with a state or an effect: it is of tensors, variables and tables.
HARMLESS = re.compile(
    r"(Stateful)?PartitionedCall|(Stateless)?(If|While|Case)|Assert|Empty|NonDeterministicInts|"
    r"\w*(Placeholder|Variable|Var[A-Z]|Assign|Scatter|Resource|Random|Rng|Uniform|Normal|"
    r"Multinomial|Sampler|Table|TensorArray|TensorList|TensorMap|Stack|Queue|Barrier|Accumulator|"
    r"Mutex|Cudnn|BoostedTrees|SeedGenerator|TensorsMap|CheckNumerics|SampleDistorted)\w*|"
    r"DeepCopy|DeviceIndex|DisableCopyOnRead|DummyIterationCounter|GuaranteeConst"
)


def test_each_operation_of_tensorflow_with_an_effect_is_known():
    operations = [op_def_registry.get(name) for name in dir(tf.raw_ops)]
    effects = {known.name for known in operations if known is not None and known.is_stateful}
    assert {"WriteFile", "VarHandleOp", "RecordInput"} <= effects
    unknown = {
        name for name in effects if not FORBIDDEN.search(name) and not HARMLESS.fullmatch(name)
    }
    assert unknown == set()


def old_saved_model(folder, change=lambda x, y, v: y, main_op=lambda y: None):
    """A SavedModel as TensorFlow 1 wrote it: one graph, and no objects."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, (None, 2), "x")
        v = v1.get_variable("v", initializer=[1.0, 2.0], use_resource=False)
        y = change(x, tf.multiply(x, v, name="y"), v)
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(folder))
        signature = v1.saved_model.predict_signature_def({"x": x}, {"y": y})
        builder.add_meta_graph_and_variables(
            session, ["serve"], {"serving_default": signature}, main_op=main_op(y)
        )
        builder.save()
    return folder


def changed(folder, change):
    """Change the only graph of a SavedModel, as somebody with an editor would."""
    file = folder / "saved_model.pb"
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString(file.read_bytes())
    change(saved.meta_graphs[0])
    file.write_bytes(saved.SerializeToString())
    return folder


def saves(x):
    return tf.raw_ops.SaveV2(prefix="/tmp/never", tensor_names=["a"], shape_and_slices=[""],
                             tensors=[x])  # fmt: skip


def test_an_old_saved_model_is_allowed_with_its_own_saver(tmp_path):
    folder = old_saved_model(tmp_path / "m")
    check_saved_model(folder, False)
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    np.testing.assert_allclose(serve(tf.constant([[1.0, 1.0]]))["y"], [[1.0, 2.0]])


def test_an_old_saved_model_saves_and_reads_nothing_when_it_is_run(tmp_path):
    def writes(x, y, v):
        with tf.control_dependencies([saves(y)]):
            return tf.identity(y, "written")

    def reads(x, y, v):
        (value,) = tf.raw_ops.RestoreV2(
            prefix="/tmp/never", tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.float32]
        )
        return y + value

    def starts(y):
        with tf.control_dependencies([saves(tf.constant(1.0))]):
            return tf.no_op("started")

    def begins(x, y, v):
        with tf.control_dependencies([saves(tf.constant(1.0))]):
            initial = tf.identity(tf.constant([1.0]), "initial")
        return y + tf.compat.v1.get_variable("w", initializer=initial, use_resource=False)

    for folder, reason in [
        (old_saved_model(tmp_path / "writes", writes), "written"),
        (old_saved_model(tmp_path / "reads", reads), "files of its own choice"),
        (old_saved_model(tmp_path / "starts", main_op=starts), "started"),
        (old_saved_model(tmp_path / "begins", begins), "initial|w/Assign"),
    ]:
        with pytest.raises(ImportRefused, match=reason):
            check_saved_model(folder, False)


def test_what_restores_an_old_saved_model_writes_nothing(tmp_path):
    def other_restoration(graph):
        graph.saver_def.restore_op_name = graph.saver_def.save_tensor_name.partition(":")[0]

    folder = changed(old_saved_model(tmp_path / "m"), other_restoration)
    with pytest.raises(ImportRefused, match="what is run to load it"):
        check_saved_model(folder, False)


def new_saved_model(folder):
    module = tf.Module()
    module.v = tf.Variable([1.0, 2.0])
    module.f = tf.function(
        lambda x: module.v * x, input_signature=[tf.TensorSpec((None, 2), tf.float32)]
    )
    tf.saved_model.save(module, str(folder), signatures=module.f)
    return folder


def saver_of(graph, kind="save"):
    (found,) = [f for f in graph.graph_def.library.function if f"traced_{kind}" in f.signature.name]
    return found


def signature_that_saves(graph):
    output = graph.signature_def["serving_default"].outputs["output_0"]
    output.name = graph.saver_def.save_tensor_name


def operation_that_saves(graph):
    """As TensorFlow 1 called functions: by their name as an operation."""
    (wrapper,) = [
        f for f in graph.graph_def.library.function if "signature_wrapper" in f.signature.name
    ]
    wrapper.node_def.add(op=saver_of(graph).signature.name, name="added")


def restoration_that_saves(graph):
    saver_of(graph, "restore").node_def.add(op="SaveV2", name="added")


def place_taker(graph):
    saver_of(graph).attr["api_implements"].s = b"something"


def gradient_that_saves(graph):
    graph.graph_def.library.gradient.add(
        function_name="f", gradient_func=saver_of(graph).signature.name
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (signature_that_saves, "what is run to load it or to predict"),
        (operation_that_saves, "signature_wrapper.* has the operation .*traced_save"),
        (restoration_that_saves, "traced_restore.* has the operation SaveV2"),
        (place_taker, "functions that replace others"),
        (gradient_that_saves, "gradients has the operation"),
    ],
)
def test_a_saver_is_no_way_to_files(tmp_path, change, reason):
    check_saved_model(new_saved_model(tmp_path / "m"), False)
    with pytest.raises(ImportRefused, match=reason):
        check_saved_model(changed(tmp_path / "m", change), False)


def test_what_saves_a_saved_model_is_called_by_nobody_else(tmp_path):
    """`SaveV2` is allowed where TensorFlow put it; a signature that reaches it writes files."""
    module = tf.Module()
    module.v = tf.Variable([1.0, 2.0])
    module.f = tf.function(
        lambda x: module.v * x, input_signature=[tf.TensorSpec((None, 2), tf.float32)]
    )
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.f)
    check_saved_model(tmp_path / "m", False)
    saved = saved_model_pb2.SavedModel()
    file = tmp_path / "m" / "saved_model.pb"
    saved.ParseFromString(file.read_bytes())
    library = saved.meta_graphs[0].graph_def.library.function
    (saver,) = [f.signature.name for f in library if "traced_save" in f.signature.name]
    (caller,) = [f for f in library if "signature_wrapper" in f.signature.name]
    node = caller.node_def.add(op="StatefulPartitionedCall", name="added")
    node.attr["f"].func.name = saver
    file.write_bytes(saved.SerializeToString())
    with pytest.raises(ImportRefused, match="traced_save"):
        check_saved_model(tmp_path / "m", False)
