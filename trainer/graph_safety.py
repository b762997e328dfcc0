"""What the graphs of a SavedModel may hold: operations on tensors, and what saves and restores it.

Owns which operations are refused (they run Python, touch files or the network, or hand tensors to
somebody else), and where the saver's, which do touch files, are allowed: a saver is what nothing
that is run to load or to predict leads to. Nothing here executes anything of the file.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tensorflow.core.framework.variable_pb2 import VariableDef
from tensorflow.core.protobuf import saved_model_pb2

from trainer.errors import ImportRefused
from trainer.safety import TRUST

FORBIDDEN = re.compile(
    r"PyFunc|File|Reader|Writer|Save|Restore|Checkpoint|Dataset|Iterator|Debug|Print|Summary|Rpc|"
    r"Dump|ImmutableConst|LMDB|Socket|CustomCall|HostCompute|_Send|_Recv|Outfeed|Infeed|"
    r"GenerateVocab|LoadAndRemap|Timestamp|Getenv|Shell|BigQuery|Plugin|Tpu|TPU|TRT|Mlir|"
    r"RecordInput|DecodeProto|EncodeProto|Skipgram|Collective|RemoteCall|Nccl|Distributed|"
    r"DataService|Stats|Abort|Session(Handle|Tensor)|^Copy(Host)?$|^(Ordered)?(Map)?(Uns|S)tage|"
    r"^(Ordered)?Map(Clear|IncompleteSize|Peek|Size)$|^(Send|Recv|AllToAll|CrossReplicaSum)$|"
    r"FixedUnigram|ImportEvent|Heartbeat|Minibatch|SparseCore|CooTensor|GlobalIterId|SyncDevice|"
    r"ThreadPool|MemoryCache"
)
"""Operations that run Python, touch files or the network, end the process, or hand tensors to
somebody else. A test holds them against all of TensorFlow's operations with an effect."""

_SAVES = re.compile(r"__inference__traced_save\w*|.*_traced_save_\d+")
_RESTORES = re.compile(r"__inference__traced_restore\w*|.*_traced_restore_\d+")
_WRITING = {"SaveV2", "MergeV2Checkpoints"}
_READING = {"RestoreV2"}
_NAMING = {"ShardedFilename", "ShardedFilespec"}


def check_saved_model(folder: Path, trusts: bool) -> None:
    """Whether a SavedModel keeps to itself, and its operations to their tensors.

    Raises:
        ImportRefused: It holds an operation that runs Python or touches files, or a link.
    """
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise ImportRefused(
                f"{path.relative_to(folder)} is a link to elsewhere; plain files are allowed. Copy "
                "the folder with its files."
            )
    if trusts:
        return
    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    except Exception as error:
        raise ImportRefused(
            f"{folder.name}/saved_model.pb is no SavedModel ({error}). Copy the folder again."
        ) from error
    for graph in saved.meta_graphs:
        _check_functions(graph)
        _check_top(graph)


def _check_functions(graph: Any) -> None:
    library = graph.graph_def.library
    for function in library.function:
        name = function.signature.name
        allowed: set[str] = set()
        is_saver = _is_saver(name)
        if is_saver:
            allowed = _NAMING | (_WRITING if _SAVES.fullmatch(name) else _READING)
            if "api_implements" in function.attr:  # it may be put into another one's place
                _refuse(name, "functions that replace others")
        for node in function.node_def:
            _check_operation(node.op, name, allowed)
            if not is_saver:
                _check_calls(_called(node), name)
    gradients = [*library.gradient, *library.registered_gradients]
    _check_calls((gradient.gradient_func for gradient in gradients), "gradients")
    _check_calls(graph.object_graph_def.concrete_functions, "functions that can be called")


def _check_top(graph: Any) -> None:
    """Whether nothing that is run, to load or to predict, saves, or reads what is not its own."""
    nodes = list(graph.graph_def.node)
    writing: set[str] = set()
    reading: set[str] = set()
    for node in nodes:
        _check_operation(node.op, "graph", _WRITING | _READING | _NAMING)
        called = set(_called(node))
        if node.op in _WRITING or any(_SAVES.fullmatch(name) for name in called):
            writing.add(node.name)
        if node.op in _READING or any(_RESTORES.fullmatch(name) for name in called):
            reading.add(node.name)
            _check_prefix(graph, node)
    restore = _node_of(graph.saver_def.restore_op_name)
    run = _mentioned(graph)
    wrong = (_after(nodes, writing) & (run | {restore})) | (_after(nodes, reading) & run)
    for name in sorted(wrong):
        _refuse(name, "graph, in what is run to load it or to predict,")


def _check_prefix(graph: Any, node: Any) -> None:
    """A restoration reads the files that TensorFlow names to it: those of the SavedModel."""
    of = {each.name: each for each in graph.graph_def.node}
    source = _node_of(node.input[0]) if node.input else ""
    for _ in of:  # and no further, should they go round
        if source in of and of[source].op == "Identity" and of[source].input:
            source = _node_of(of[source].input[0])
    if source != _node_of(graph.saver_def.filename_tensor_name):
        _refuse(node.op, "graph, with files of its own choice,")


def _after(nodes: Iterable[Any], roots: set[str]) -> set[str]:
    """Names of nodes and of all that is computed, or waits, behind them."""
    following: dict[str, list[str]] = {}
    for node in nodes:
        for source in node.input:
            following.setdefault(_node_of(source), []).append(node.name)
    found, waiting = set(roots), list(roots)
    while waiting:
        for name in following.get(waiting.pop(), []):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def _mentioned(graph: Any) -> set[str]:
    """Nodes that signatures, assets and collections (initial values, what starts it) name."""
    texts: list[str] = []
    for part in [*graph.signature_def.values(), *graph.asset_file_def]:
        texts += _texts(part)
    for name, entry in graph.collection_def.items():
        if name != "savers":
            texts += _texts(entry)
        if name.endswith("variables") or name == "global_step":
            for packed in entry.bytes_list.value:
                texts += _texts(_variable(packed))
    return {_node_of(text) for text in texts}


def _texts(message: Any) -> Iterator[str]:
    """All texts of a message."""
    for field, content in message.ListFields():
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map:
            content = list(content.values())
        is_single = isinstance(content, str | bytes | int | float) or _is_message(content)
        for value in [content] if is_single else content:
            if isinstance(value, str):
                yield value
            elif _is_message(value):
                yield from _texts(value)


def _is_message(value: Any) -> bool:
    return hasattr(value, "ListFields")


def _variable(packed: bytes) -> Any:
    try:
        return VariableDef.FromString(packed)
    except Exception as error:
        raise ImportRefused(
            f"the SavedModel's graph has a variable that cannot be read ({error}). Save it again."
        ) from error


def _node_of(tensor: str) -> str:
    return tensor.removeprefix("^").partition(":")[0]


def _is_saver(function: str) -> bool:
    return bool(_SAVES.fullmatch(function) or _RESTORES.fullmatch(function))


def _check_operation(operation: str, where: str, allowed: set[str]) -> None:
    if operation not in allowed and FORBIDDEN.search(operation):
        _refuse(operation, where)


def _called(node: Any) -> Iterator[str]:
    """Functions that a node calls: by an attribute, or by its operation, as TensorFlow 1 did."""
    yield node.op
    for attribute in node.attr.values():
        for called in [attribute.func, *attribute.list.func]:
            yield called.name


def _check_calls(names: Iterable[str], where: str) -> None:
    """Whether something calls what only the saver may: it writes and reads files."""
    for name in names:
        if _is_saver(name):
            _refuse(name, where)


def _refuse(operation: str, where: str) -> NoReturn:
    raise ImportRefused(
        f"the SavedModel's {where} has the operation {operation}, which can run code or reach "
        f"files; operations on tensors are allowed. {TRUST}"
    )
