"""How much of Q4_K's weights the GPU's way to multiply them out loses, without a GPU.

    python -m benchmarks.gpu_accuracy

The arithmetic of native/cuda/codes.cuh and formats.cuh in numpy: scales and minimums in FP16, rows times a power of
two, each weight rounded once. Prints the root mean square of the error over that of the weights, which are quantised
from random ones, and the same of products with random inputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

# The storage formats in numpy belong to the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from unit.gguf_formats import FORMATS, group_codes, group_head, quantize

Array = npt.NDArray[np.float64]

ROWS, COLS, TOKENS = 64, 4096, 256


def half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float64)


def parts(data: bytes) -> tuple[Array, Array, Array, Array, Array]:
    """Scales and minimums of blocks `[rows, blocks, 1]`, those of groups `[…, 8]`, codes `[…, 8, 32]`."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, FORMATS["Q4_K"].block_bytes)
    of_blocks = (*group_head(blocks), group_codes(blocks[:, 16:]))
    scale, minimum, scales, minimums, codes = (
        part.reshape(ROWS, -1, *part.shape[1:]).astype(np.float64) for part in of_blocks
    )
    return scale, minimum, scales, minimums, codes


def stored(scale: Array, minimum: Array, scales: Array, minimums: Array, codes: Array) -> Array:
    """The weights as the tensor cores get them, without the row's power of two."""
    magnitude = np.maximum(np.abs(scale) * np.maximum(scales, 1) * 2.0**17, np.abs(minimum) * minimums * 4)
    factor = 2.0 ** (7 - np.floor(np.log2(magnitude.reshape(ROWS, -1).max(axis=1))))[:, None, None]
    group_scales = half(scales * half(scale * factor * 2.0**24))
    group_minimums = half(minimums * 2.0**-9 * half(-minimum * factor * 2.0**9))
    weights = half(codes * 2.0**-24 * group_scales[..., None] + group_minimums[..., None])
    return (weights / factor[..., None]).reshape(ROWS, COLS)


def size(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    random = np.random.default_rng(0)
    shape = (ROWS, COLS)
    kinds = {
        "normal": random.standard_normal(shape),
        "normal, mean 1.5": random.standard_normal(shape) + 1.5,
        "Student, 3 degrees": random.standard_t(3, shape),
    }
    for name, values in kinds.items():
        scale, minimum, scales, minimums, codes = parts(quantize("Q4_K", (values * 0.02).astype(np.float32)))
        exact = ((scale * scales)[..., None] * codes - (minimum * minimums)[..., None]).reshape(shape)
        error = stored(scale, minimum, scales, minimums, codes) - exact
        inputs = random.standard_normal((COLS, TOKENS))
        products = size(error @ inputs) / size(exact @ inputs)
        sys.stdout.write(f"{name:18}  weights {size(error) / size(exact):.2e}  products {products:.2e}\n")


if __name__ == "__main__":
    main()
