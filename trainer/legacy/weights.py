"""Arrays of old files in the order and shape of Keras 3's layers.

Pure functions of arrays. Owns the layouts: Keras 1 kept a kernel a gate, and kernels of
convolutions as the backend liked them; Theano turned kernels around; cuDNN's layers kept transposed
ones.
"""

from collections.abc import Sequence

import numpy as np

from trainer.errors import ImportRefused
from trainer.legacy.file import Array

HARD_SIGMOID_SCALE = 1.2
"""Old Keras: clip(0.2 z + 0.5, 0, 1). Keras 3: clip(z / 6 + 0.5, 0, 1). So old(z) = new(1.2 z)."""


def turned(kernel: Array, axes: int) -> Array:
    """A kernel with its first `axes` axes, those in space, reversed: Theano's convolution."""
    return kernel[tuple(slice(None, None, -1) for _ in range(axes))]


def spatial_last_of_keras_1(kernel: Array, axes: int) -> Array:
    """Keras 1's `(filters, channels, *space)` as `(*space, channels, filters)`."""
    return np.transpose(kernel, [*range(2, 2 + axes), 1, 0])


def conv1d_of_keras_1(kernel: Array, size: int, filters: int) -> Array:
    """A kernel of Keras 1's Convolution1D as `(size, channels, filters)`.

    It was `(size, 1, channels, filters)` or, before 1.2, `(filters, channels, size, 1)`.
    """
    if kernel.ndim != 4:
        return kernel
    if kernel.shape[:2] != (size, 1) or kernel.shape[3] != filters:
        kernel = np.transpose(kernel, (2, 3, 1, 0))
    return kernel[:, 0]


def joined_gates(arrays: Sequence[Array], order: Sequence[int]) -> list[Array]:
    """Kernel, recurrent kernel and bias of arrays that stand gate by gate.

    Args:
        arrays: `[W, U, b]` of the first gate, then of the second, and so on.
        order: Which of the old gates comes first, second, ... in the new arrays.
    """
    parts = len(arrays) // len(order)
    return [
        np.concatenate([arrays[parts * gate + part] for gate in order], axis=-1)
        for part in range(parts)
    ]


def from_cudnn(arrays: Sequence[Array], gates: int) -> list[Array]:
    """Arrays of a CuDNNLSTM (4 gates) or CuDNNGRU (3) as those of LSTM, or GRU that resets after.

    cuDNN keeps each gate's kernels transposed, in Fortran's order, and two biases.
    """
    kernel, recurrent, bias = arrays
    kernel = np.hstack([k.T.reshape(k.shape, order="F") for k in np.hsplit(kernel, gates)])
    recurrent = np.hstack([k.T for k in np.hsplit(recurrent, gates)])
    bias = bias.reshape(2, -1) if gates == 3 else np.sum(np.split(bias, 2), axis=0)
    return [kernel, recurrent, bias]


def scaled_gates(arrays: Sequence[Array], gates: Sequence[bool]) -> list[Array]:
    """Arrays with the gates marked True scaled, so that Keras 3's hard sigmoid gives the old one.

    Exact, because a gate is linear in kernel, recurrent kernel and bias.
    """
    scales = np.array([HARD_SIGMOID_SCALE if is_scaled else 1.0 for is_scaled in gates])
    return [
        (array * np.repeat(scales, array.shape[-1] // len(gates))).astype(array.dtype)
        for array in arrays
    ]


def check_shapes(owner: str, arrays: Sequence[Array], shapes: Sequence[tuple[int, ...]]) -> None:
    """Whether arrays fit the variables of a layer.

    Raises:
        ImportRefused: They do not.
    """
    found = [tuple(array.shape) for array in arrays]
    if found != [tuple(shape) for shape in shapes]:
        raise ImportRefused(
            f"layer {owner!r} has arrays of shapes {found} in the file and {list(shapes)} by its "
            "configuration; they must agree. The file is damaged, or of a layer that is not known."
        )
