"""Whose arrays are whose: from the groups of a file to the layers that were rebuilt.

Owns the order in which Keras wrote the arrays of a nested model: those that are trained first,
layer by layer, then the others.
"""

from collections.abc import Iterator, Sequence

import keras
import numpy as np

from trainer.errors import ImportRefused
from trainer.legacy.file import Array, Stored
from trainer.legacy.piece import Piece
from trainer.legacy.weights import check_shapes


def fill_from_groups(piece: Piece, groups: dict[str, list[Stored]]) -> None:
    """Give a layer of the outermost model its arrays.

    Keras 1 wrote the layers of a nested Sequential as groups of their own.
    """
    stored = groups.get(piece.name, [])
    if piece.parts is not None and not stored:
        for part in piece.parts:
            fill_from_groups(part, groups)
        return
    if piece.parts is None:
        _fill(piece, [entry.values for entry in stored])
        return
    for leaf, arrays in _shared_out(piece, stored):
        _fill(leaf, arrays)


def _leaves(piece: Piece) -> Iterator[Piece]:
    """The layers of a nested model that are no models themselves."""
    if piece.parts is None:
        yield piece
        return
    for part in piece.parts:
        yield from _leaves(part)


def _shared_out(piece: Piece, stored: Sequence[Stored]) -> Iterator[tuple[Piece, list[Array]]]:
    """A nested model's arrays, each leaf's own."""
    leaves = [leaf for leaf in _leaves(piece) if sum(leaf.counts)]
    by_name = {leaf.name: [s for s in stored if leaf.name in s.name.split("/")] for leaf in leaves}
    if len(by_name) == len(leaves) and all(
        len(by_name[leaf.name]) == sum(leaf.counts) for leaf in leaves
    ):
        yield from ((leaf, [entry.values for entry in by_name[leaf.name]]) for leaf in leaves)
        return
    wanted = sum(sum(leaf.counts) for leaf in leaves)
    if wanted != len(stored):
        raise ImportRefused(
            f"the model {piece.name!r} inside the model has {len(stored)} arrays in the file and "
            f"{wanted} by its layers; they must agree. The file is damaged, or of layers that are "
            "not known."
        )
    rest = list(stored)
    given: dict[int, list[Array]] = {id(leaf): [] for leaf in leaves}
    for kind in (0, 1):
        for leaf in leaves:
            trained, other = leaf.counts
            counts = (trained, other) if leaf.is_trainable else (0, trained + other)
            given[id(leaf)] += [entry.values for entry in rest[: counts[kind]]]
            rest = rest[counts[kind] :]
    yield from ((leaf, given[id(leaf)]) for leaf in leaves)


def _fill(piece: Piece, arrays: list[Array]) -> None:
    if piece.holder is None:
        return
    wanted = sum(piece.counts)
    if len(arrays) != wanted:
        raise ImportRefused(
            f"layer {piece.name!r} has {len(arrays)} arrays in the file and {wanted} by its "
            "configuration; they must agree. The file is damaged, or of a layer that is not known."
        )
    try:
        values = piece.arrange([np.asarray(array) for array in arrays])
    except (ValueError, IndexError) as error:
        raise ImportRefused(
            f"layer {piece.name!r}: its arrays have shapes {[a.shape for a in arrays]}, which its "
            f"configuration does not give ({error}). The file is damaged."
        ) from error
    if not values:
        return
    check_shapes(piece.name, values, [variable.shape for variable in piece.holder.weights])
    piece.holder.set_weights(values)
    if isinstance(piece.holder, keras.layers.Normalization):
        piece.holder.finalize_state()
