"""Our matrix products against cuBLAS's, where the machine has it: two ways to sum the same products of FP16 factors."""

from __future__ import annotations

import numpy as np
import pytest

from gpu.cublas import Cublas, find_cublas
from gpu.kernel_hook import matmul
from gpu.test_matmul import error, typical_size

pytestmark = pytest.mark.gpu

# Both sum exact products in FP32, in different orders; ours stores weights times a power of two, which is exact.
MAX_RELATIVE_ERROR = 1e-5


@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 2048])
@pytest.mark.parametrize(("rows", "cols"), [(896, 4864), (4096, 4096)])
def test_products_agree_with_cublas(rows: int, cols: int, tokens: int) -> None:
    library = find_cublas()
    if library is None:
        pytest.skip("no cuBLAS on this machine; float64 stays the oracle (test_matmul.py)")
    random = np.random.default_rng(rows + tokens)
    weights = (random.standard_normal((rows, cols)) / 64).astype(np.float16)
    inputs = random.standard_normal((tokens, cols)).astype(np.float16)
    expected, _ = Cublas(library).product(weights, inputs)
    values = inputs.astype(np.float32)
    actual, _ = matmul("F16", weights.tobytes(), values, rows)
    assert error(actual, expected) < MAX_RELATIVE_ERROR * typical_size(values, weights.astype(np.float32))
