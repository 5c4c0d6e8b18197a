"""Multiplies once through every kernel, epilogue and range of tokens, for a run under compute-sanitizer.

    PYTHONPATH=.:tests compute-sanitizer --tool memcheck python -m gpu.every_product BF16 Q4_K

What the products are is checked by test_matmul.py; here, guard bytes and the sanitizer look on.
"""

from __future__ import annotations

import sys

import numpy as np
from benchmarks.random_blocks import random_blocks

from gpu.kernel_hook import KERNELS, NARROW, matmul

ROWS, COLS = 80, 768
MOST_NARROW_TOKENS = 64


def multiply(dtype: str, random: np.random.Generator) -> int:
    """The number of products."""
    weights, up = (random_blocks(dtype, ROWS * COLS, 1 / 28, random).tobytes() for _ in range(2))
    count = 0
    for tokens in (1, 5, 40, 65, 200):
        inputs = random.standard_normal((tokens, COLS)).astype(np.float16).astype(np.float32)
        addend = random.standard_normal((tokens, ROWS)).astype(np.float32)
        for kernel in KERNELS:
            if kernel == NARROW and tokens > MOST_NARROW_TOKENS:
                continue
            matmul(dtype, weights, inputs, ROWS, kernel=kernel)
            matmul(dtype, weights, inputs, ROWS, kernel=kernel, up=up)
            matmul(dtype, weights, inputs, ROWS, kernel=kernel, addend=addend)
            count += 3
    return count


if __name__ == "__main__":
    source = np.random.default_rng(3)
    sys.stdout.write(f"{sum(multiply(dtype, source) for dtype in sys.argv[1:])} products\n")
