"""What one old layer becomes: steps of Keras 3, the layer that holds its arrays, and how they fit.

Owns the place of the channels. Keras 3 convolves on a CPU only with the channels at the end, so the
steps of a `channels_first` layer work on tensors whose channels were moved there. Between steps the
move is kept as long as nobody minds (`Moved`), and undone for the first that does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from trainer.legacy.file import Array, Config, OldModel

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Step:
    """A layer of Keras 3.

    Attributes:
        layer: The layer.
        is_moved: Whether it wants the channels, which the old model had first, at the end; None
            where it treats each number by itself.
    """

    layer: keras.layers.Layer
    is_moved: bool | None = False


@dataclass
class Piece:
    """One old layer.

    Attributes:
        name: Its name in the file.
        steps: What is applied, in order.
        holder: The layer whose variables take its arrays; None where it has none.
        arrange: From the arrays of the file to those of the holder's `weights`.
        stored: How many trainable and other arrays the file has of it; None: as the holder has.
        parts: The layers of a nested model, in the order in which the file lists them.
        is_trainable: Whether it was not frozen.
    """

    name: str
    steps: list[Step]
    holder: keras.layers.Layer | None = None
    arrange: Callable[[list[Array]], list[Array]] = list
    stored: tuple[int, int] | None = None
    parts: "list[Piece] | None" = None
    is_trainable: bool = True

    @property
    def counts(self) -> tuple[int, int]:
        """How many trainable and other arrays a file has for it. Call when it is built."""
        if self.parts is not None:
            counts = [part.counts for part in self.parts]
            return sum(count[0] for count in counts), sum(count[1] for count in counts)
        if self.stored is not None:
            return self.stored
        if self.holder is None:
            return 0, 0
        variables = self.holder.weights
        if not self.is_trainable:
            trained = sum(1 for v in variables if "moving_" not in v.path)
            return trained, len(variables) - trained
        return len(self.holder.trainable_weights), len(self.holder.non_trainable_weights)


@dataclass
class Site:
    """Where a layer is rebuilt: the model it comes from, and how others are rebuilt inside it.

    Attributes:
        model: The old model.
        ordering: The place of channels where a layer does not tell it.
        make: From class name, configuration and input shapes to a piece, for layers inside layers.
        notes: What the user should know; each is kept once.
    """

    model: OldModel
    ordering: str
    make: "Callable[[str, Config, Sequence[Shape], Site], Piece]"
    notes: list[str] = field(default_factory=list)

    @property
    def is_theano(self) -> bool:
        """Whether Theano computed the model."""
        return self.model.backend == "theano"

    @property
    def is_keras_1(self) -> bool:
        """Whether the arrays lie as Keras 1 laid them."""
        return self.model.keras == 1

    def note(self, text: str) -> None:
        """Keep what the user should know."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Moved:
    """A tensor, and whether its channels, first in the old model, stand at the end."""

    tensor: Any
    is_moved: bool = False

    @property
    def rank(self) -> int:
        """Axes, that of the rows among them."""
        return len(self.tensor.shape)

    @property
    def shape(self) -> Shape:
        """Its shape as the old model has it."""
        shape = tuple(self.tensor.shape)
        return (shape[0], shape[-1], *shape[1:-1]) if self.is_moved else shape


def to_end(rank: int) -> keras.layers.Layer:
    """Moves the first axis of a row to the end; `rank` counts the axis of the rows."""
    return keras.layers.Permute((*range(2, rank), 1))


def to_front(rank: int) -> keras.layers.Layer:
    """Moves the last axis of a row to the front."""
    return keras.layers.Permute((rank - 1, *range(1, rank - 1)))


def settled(value: Moved, wanted: bool, used: list[keras.layers.Layer]) -> Moved:
    """The tensor with its channels where they are wanted; layers for that are added to `used`."""
    if value.is_moved == wanted or value.rank < 3:
        return value
    layer = to_end(value.rank) if wanted else to_front(value.rank)
    used.append(layer)
    return Moved(layer(value.tensor), wanted)


def apply_steps(
    steps: Sequence[Step], value: Moved, used: list[keras.layers.Layer], **keywords: Any
) -> Moved:
    """Apply steps one after the other; all layers that were called are added to `used`.

    Args:
        steps: The steps.
        value: What the first one takes.
        used: Gets the layers in the order of their calls.
        **keywords: For the call of the first step.
    """
    for step in steps:
        if step.is_moved is not None:
            value = settled(value, step.is_moved, used)
        used.append(step.layer)
        outcome = step.layer(value.tensor, **keywords)
        keywords = {}
        if isinstance(outcome, list | tuple):
            return Moved(outcome)
        value = Moved(outcome, value.is_moved and len(outcome.shape) == value.rank)
    return value
