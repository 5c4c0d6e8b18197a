"""The matrix products of every format against float64, with guard bytes, and their independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.kernel_hook import KERNELS, NARROW, matmul
from unit.gguf_formats import FORMATS, Floats, dequantize, quantize

pytestmark = pytest.mark.gpu

# Of the error of a product against what its factors' lengths make typical. Weights are rounded to FP16 once or twice
# (up to 2^-11 each, which a single output does not average out), inputs not at all; sums are exact beside that.
MAX_RELATIVE_ERROR = 1.2e-3
WIDTHS = {1: (32, 96, 576), 32: (32, 96, 4864), 256: (256, 768, 4864 // 256 * 256)}


def random_case(dtype: str, rows: int, cols: int, tokens: int, seed: int) -> tuple[bytes, Floats, Floats]:
    """A matrix's bytes, its exact values, and inputs that FP16 holds exactly."""
    random = np.random.default_rng(seed)
    weights = (random.standard_normal((rows, cols)) * random.uniform(0.001, 2, (rows, 1))).astype(np.float32)
    data = quantize(dtype, weights)
    inputs = random.standard_normal((tokens, cols)).astype(np.float16).astype(np.float32)
    return data, dequantize(dtype, data, (rows, cols)), inputs


def typical_size(inputs: Floats, values: Floats) -> float:
    """Root mean square of products of random inputs and weights of these lengths."""
    lengths = np.linalg.norm(inputs.astype(np.float64)) * np.linalg.norm(values.astype(np.float64))
    return float(lengths / np.sqrt(inputs.shape[0] * values.shape[0] * values.shape[1]))


def error(actual: Floats, expected: np.ndarray) -> float:
    """Root mean square of the difference."""
    assert np.isfinite(actual).all()
    return float(np.sqrt(np.mean((actual - expected) ** 2)))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 33, 65, 130])
@pytest.mark.parametrize("rows", [1, 16, 47, 272])
def test_products_agree_with_float64(dtype: str, tokens: int, rows: int) -> None:
    for cols in WIDTHS[FORMATS[dtype].block_values]:
        data, values, inputs = random_case(dtype, rows, cols, tokens, seed=rows + cols)
        expected = inputs.astype(np.float64) @ values.astype(np.float64).T
        for kernel in KERNELS:
            actual, _ = matmul(dtype, data, inputs, rows, kernel=kernel)
            assert error(actual, expected) < MAX_RELATIVE_ERROR * typical_size(inputs, values), (cols, kernel)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 40, 130])
def test_epilogues_agree_with_float64(dtype: str, tokens: int) -> None:
    rows, cols = 80, 768
    data, values, inputs = random_case(dtype, rows, cols, tokens, seed=1)
    up_data, up_values, _ = random_case(dtype, rows, cols, tokens, seed=2)
    bias = np.random.default_rng(3).standard_normal(rows).astype(np.float32)
    addend = np.random.default_rng(4).standard_normal((tokens, rows)).astype(np.float32)
    product = inputs.astype(np.float64) @ values.astype(np.float64).T
    up = inputs.astype(np.float64) @ up_values.astype(np.float64).T
    bound = MAX_RELATIVE_ERROR * typical_size(inputs, values)
    silu = product / (1 + np.exp(-product))
    for kernel in KERNELS:
        biased, _ = matmul(dtype, data, inputs, rows, bias=bias, kernel=kernel)
        assert error(biased, product + bias) < bound
        added, _ = matmul(dtype, data, inputs, rows, addend=addend, kernel=kernel)
        assert error(added, product + addend) < bound
        gated, _ = matmul(dtype, data, inputs, rows, up=up_data, kernel=kernel)
        assert error(gated, silu * up) < 2 * MAX_RELATIVE_ERROR * np.sqrt(np.mean((silu * up) ** 2))


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e9])
def test_inputs_beyond_half_precision_are_scaled(tokens: int, magnitude: float) -> None:
    data, values, inputs = random_case("Q8_0", 64, 256, tokens, seed=5)
    inputs = (inputs * np.float32(magnitude)).astype(np.float32)
    actual, _ = matmul("Q8_0", data, inputs, 64, scaled=True)
    expected = inputs.astype(np.float64) @ values.astype(np.float64).T
    assert error(actual, expected) < MAX_RELATIVE_ERROR * typical_size(inputs, values)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_row_has_the_same_bits_for_any_number_of_rows(dtype: str) -> None:
    rows, cols, most = 304, 1024, 512
    data, _, inputs = random_case(dtype, rows, cols, most, seed=6)
    gate_up, _, _ = random_case(dtype, rows, cols, 1, seed=7)
    for up in (None, gate_up):
        reference = np.concatenate([matmul(dtype, data, inputs[i : i + 1], rows, up=up)[0] for i in range(0, most, 37)])
        for tokens in (*range(1, 18), 24, 31, 32, 33, 63, 64, 65, 100, 128, 200, 256, 511, 512):
            for kernel in KERNELS:
                actual, _ = matmul(dtype, data, inputs[:tokens], rows, up=up, kernel=kernel)
                same = actual[::37].view(np.uint32) == reference[: (tokens + 36) // 37].view(np.uint32)
                assert same.all(), (tokens, kernel, up is not None)


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_rows_of_a_large_matrix_have_the_bits_of_a_small_one_of_as_many_pieces(dtype: str) -> None:
    # As many tiles as there are in no other test: whole ones, pieces and pairs of blocks each take several in turn.
    rows, cols, copies, pieces, tokens = 304, 512, 27, 4, 200
    data, _, inputs = random_case(dtype, rows, cols, tokens, seed=8)
    small, _ = matmul(dtype, data, inputs, rows, kernel=NARROW, num_splits=pieces)
    for kernel in (-1, *KERNELS):
        large, _ = matmul(dtype, data * copies, inputs, rows * copies, kernel=kernel, num_splits=pieces)
        assert (large.view(np.uint32) == np.tile(small, copies).view(np.uint32)).all(), kernel


def test_a_format_without_whole_blocks_is_refused() -> None:
    with pytest.raises(RuntimeError, match="UNSUPPORTED_MODEL"):
        matmul("F32", bytes(4 * 4 * 20), np.zeros((1, 20), np.float32), 4)
