"""Large bodies in parts: nothing on their way has to hold, copy or pickle them at once.

A body is pickled with its arrays left where they are; what travels are parts of bounded size, cut
when they are asked for. The receiver puts them together; a body whose sender died is forgotten when
the next one begins.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PART_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Part:
    """A piece of a body.

    Attributes:
        kind: What the whole is, such as the kind of a message.
        sizes: Bytes of each buffer of the body; in the first part only.
        data: The next bytes of all buffers, one after the other.
        is_last: Whether the body is whole with it.
    """

    kind: str
    sizes: tuple[int, ...]
    data: bytes
    is_last: bool

    @property
    def nbytes(self) -> int:
        """How much it carries."""
        return len(self.data)


def split(kind: str, body: Any) -> Iterator[Part]:
    """Parts of a picklable body, in order; its arrays must not change meanwhile."""
    arrays: list[pickle.PickleBuffer] = []
    header = pickle.dumps(body, protocol=5, buffer_callback=arrays.append)
    buffers = [memoryview(header), *(array.raw() for array in arrays)]
    sizes = tuple(buffer.nbytes for buffer in buffers)
    left = sum(sizes)
    pieces: list[memoryview] = []
    room = PART_BYTES
    for buffer in buffers:
        at = 0
        while at < buffer.nbytes:
            piece = buffer[at : at + room]
            pieces.append(piece)
            at += piece.nbytes
            room -= piece.nbytes
            left -= piece.nbytes
            if not room or not left:
                yield Part(kind, sizes, b"".join(pieces), left == 0)
                sizes, pieces, room = (), [], PART_BYTES


class Assembly:
    """Puts the parts of one sender together."""

    def __init__(self) -> None:
        self._buffers: list[bytearray] = []
        self._at = (0, 0)

    def add(self, part: Part) -> tuple[str, Any] | None:
        """Take the next part; returns (kind, body) when it was the last one."""
        if part.sizes:
            self._buffers = [bytearray(size) for size in part.sizes]
            self._at = (0, 0)
        if not self._buffers:
            return None  # its beginning was lost with another process
        self._fill(memoryview(part.data))
        if not part.is_last:
            return None
        header, *arrays = self._buffers
        self._buffers = []
        return part.kind, pickle.loads(header, buffers=arrays)

    def _fill(self, data: memoryview) -> None:
        number, at = self._at
        while data:
            buffer = self._buffers[number]
            piece = data[: len(buffer) - at]
            buffer[at : at + len(piece)] = piece
            data, at = data[len(piece) :], at + len(piece)
            if at == len(buffer):
                number, at = number + 1, 0
        self._at = (number, at)
