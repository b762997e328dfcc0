"""Old layouts of arrays against computations that are written out: a gate at a time, in numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ImportRefused
from trainer.legacy import weights


def hard_sigmoid_2(z):
    return np.clip(0.2 * z + 0.5, 0, 1)


def hard_sigmoid_3(z):
    return np.clip(z / 6 + 0.5, 0, 1)


def arrays_by_gate(gates, units, width, seed):
    """W, U, b of each gate, as Keras 1 wrote them."""
    random = np.random.default_rng(seed)
    shapes = [(width, units), (units, units), (units,)] * gates
    return [random.normal(size=shape) for shape in shapes]


def lstm_of_keras_1(arrays, rows):
    """The last output; arrays in the order input, cell, forget, output."""
    (wi, ui, bi, wc, uc, bc, wf, uf, bf, wo, uo, bo) = arrays
    h = c = np.zeros((len(rows), bi.size))
    for x in np.moveaxis(rows, 1, 0):
        i, f = hard_sigmoid_2(x @ wi + h @ ui + bi), hard_sigmoid_2(x @ wf + h @ uf + bf)
        o = hard_sigmoid_2(x @ wo + h @ uo + bo)
        c = f * c + i * np.tanh(x @ wc + h @ uc + bc)
        h = o * np.tanh(c)
    return h


def lstm_of_keras_3(kernel, recurrent, bias, rows):
    h = c = np.zeros((len(rows), len(recurrent)))
    for x in np.moveaxis(rows, 1, 0):
        i, f, z, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=-1)
        c = hard_sigmoid_3(f) * c + hard_sigmoid_3(i) * np.tanh(z)
        h = hard_sigmoid_3(o) * np.tanh(c)
    return h


def gru_of_keras_1(arrays, rows):
    (wz, uz, bz, wr, ur, br, wh, uh, bh) = arrays
    h = np.zeros((len(rows), bz.size))
    for x in np.moveaxis(rows, 1, 0):
        z, r = hard_sigmoid_2(x @ wz + h @ uz + bz), hard_sigmoid_2(x @ wr + h @ ur + br)
        h = z * h + (1 - z) * np.tanh(x @ wh + (r * h) @ uh + bh)
    return h


def gru_of_keras_3(kernel, recurrent, bias, rows):
    units = len(recurrent)
    h = np.zeros((len(rows), units))
    for x in np.moveaxis(rows, 1, 0):
        zx, rx, hx = np.split(x @ kernel + bias, 3, axis=-1)
        z = hard_sigmoid_3(zx + h @ recurrent[:, :units])
        r = hard_sigmoid_3(rx + h @ recurrent[:, units : 2 * units])
        h = z * h + (1 - z) * np.tanh(hx + (r * h) @ recurrent[:, 2 * units :])
    return h


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_the_gates_of_an_lstm_come_into_the_new_order(units, width, seed):
    arrays = arrays_by_gate(4, units, width, seed)
    rows = np.random.default_rng(seed + 1).normal(size=(3, 4, width))
    joined = weights.joined_gates(arrays, (0, 2, 1, 3))
    scaled = weights.scaled_gates(joined, (True, True, False, True))
    assert lstm_of_keras_3(*scaled, rows) == pytest.approx(lstm_of_keras_1(arrays, rows))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_the_gates_of_a_gru_come_into_the_new_order(units, width, seed):
    arrays = arrays_by_gate(3, units, width, seed)
    rows = np.random.default_rng(seed + 1).normal(size=(3, 4, width))
    scaled = weights.scaled_gates(weights.joined_gates(arrays, (0, 1, 2)), (True, True, False))
    assert gru_of_keras_3(*scaled, rows) == pytest.approx(gru_of_keras_1(arrays, rows))


@given(st.floats(-20, 20))
def test_the_old_hard_sigmoid_is_the_new_one_of_a_scaled_number(z):
    assert hard_sigmoid_3(weights.HARD_SIGMOID_SCALE * z) == pytest.approx(hard_sigmoid_2(z))


def test_theano_convolved_with_kernels_that_were_turned_around():
    random = np.random.default_rng(0)
    kernel, image = random.normal(size=(3, 2, 2, 5)), random.normal(size=(6, 7, 2))
    turned = weights.turned(kernel, 2)
    correlated = sum(
        image[1 + r, 2 + c] @ turned[r, c] for r in range(3) for c in range(2)
    )  # the number at (1, 2) of a correlation
    convolved = sum(
        image[1 + 2 - r, 2 + 1 - c] @ kernel[r, c] for r in range(3) for c in range(2)
    )  # the same of a convolution
    assert correlated == pytest.approx(convolved)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([3, 4]))
def test_arrays_of_cudnn_go_there_and_back(units, width, gates):
    """cuDNN's form is made here as Keras 2 made it, from the usual one."""
    random = np.random.default_rng(units * 10 + width)
    kernel = random.normal(size=(width, gates * units))
    recurrent = random.normal(size=(units, gates * units))
    bias = random.normal(size=2 * gates * units)
    in_cudnn = [
        np.hstack([k.T.reshape(k.shape) for k in np.hsplit(kernel, gates)]),
        np.hstack([k.T for k in np.hsplit(recurrent, gates)]),
        bias,
    ]
    found = weights.from_cudnn(in_cudnn, gates)
    assert np.array_equal(found[0], kernel)
    assert np.array_equal(found[1], recurrent)
    if gates == 3:
        assert found[2].shape == (2, 3 * units)
    else:
        assert found[2] == pytest.approx(bias[: 4 * units] + bias[4 * units :])


def test_kernels_of_keras_1_come_into_the_order_of_keras_2():
    random = np.random.default_rng(0)
    kernel = random.normal(size=(4, 3, 5, 6))  # filters, channels, rows, columns
    new = weights.spatial_last_of_keras_1(kernel, 2)
    assert new.shape == (5, 6, 3, 4)
    assert new[2, 1, 0, 3] == kernel[3, 0, 2, 1]
    line = random.normal(size=(5, 1, 3, 4))  # size, 1, channels, filters
    assert np.array_equal(weights.conv1d_of_keras_1(line, 5, 4), line[:, 0])
    older = np.transpose(line, (3, 2, 0, 1))
    assert np.array_equal(weights.conv1d_of_keras_1(older, 5, 4), line[:, 0])


def test_arrays_that_do_not_fit_are_refused_by_the_layers_name():
    with pytest.raises(ImportRefused, match=r"'dense_1' has arrays of shapes \[\(2, 3\)\]"):
        weights.check_shapes("dense_1", [np.zeros((2, 3))], [(3, 2)])
