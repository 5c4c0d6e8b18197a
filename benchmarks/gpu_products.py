"""Times the matrix products of a GPU: ours, ours without the promise of equal bits for any batch, and cuBLAS's.

    python -m benchmarks.gpu_products [--tokens 1,32,256,2048] [--json FILE]

`freest` is the fastest of our kernels over all ways to cut the sums, chosen anew for every number of tokens: what one
would run if the bytes of an answer might depend on its company. What the product runs cuts them by the weight's shape
alone. cuBLAS multiplies the same values in FP16 and chooses freely. Medians of `--runs` runs of ten products of one
matrix, which therefore lies in the second-level cache if it fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.random_blocks import FORMATS, random_blocks

# The kernels' hook and cuBLAS belong to the tests of the GPU.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from gpu.cublas import Cublas, find_cublas
from gpu.kernel_hook import KERNELS, NARROW, matmul

# By name: rows, columns. Of Qwen2.5-0.5B and Llama-3.1-8B.
SHAPES = {"0.5B q,k,v": (1152, 896), "0.5B down": (896, 4864), "8B q,k,v": (6144, 4096), "8B down": (4096, 14336)}
SPLITS = (1, 2, 4, 8, 16)
MOST_NARROW_TOKENS = 64


def measure(formats: list[str], tokens: list[int], runs: int) -> list[dict[str, object]]:
    random = np.random.default_rng(1)
    library = find_cublas()
    cublas = Cublas(library) if library is not None else None
    rows: list[dict[str, object]] = []
    for name, (outputs, inputs) in SHAPES.items():
        halves = (random.standard_normal((outputs, inputs)) / 64).astype(np.float16)
        for count in tokens:
            values = random.standard_normal((count, inputs)).astype(np.float16)
            theirs_us = cublas.product(halves, values, runs)[1] if cublas is not None else None
            for kind in formats:
                weights = random_blocks(kind, outputs * inputs, 1 / 64, random).tobytes()

                def time_us(
                    kernel: int = -1,
                    num_splits: int = 0,
                    kind: str = kind,
                    weights: bytes = weights,
                    values: np.ndarray = values,
                    outputs: int = outputs,
                ) -> float:
                    single = values.astype(np.float32)
                    _, median_us = matmul(
                        kind, weights, single, outputs, kernel=kernel, repeats=runs, num_splits=num_splits
                    )
                    return median_us

                ours_us = time_us()
                kernels = [kernel for kernel in KERNELS if kernel != NARROW or count <= MOST_NARROW_TOKENS]
                freest_us = min(ours_us, *(time_us(kernel, splits) for kernel in kernels for splits in SPLITS))
                tera = 2e-6 * outputs * inputs * count
                row = {
                    "matrix": name,
                    "format": kind,
                    "tokens": count,
                    "us": round(ours_us, 2),
                    "freest_us": round(freest_us, 2),
                    "cublas_us": None if theirs_us is None else round(theirs_us, 2),
                    "tflops": round(tera / ours_us, 1),
                }
                rows.append(row)
                against = "" if theirs_us is None else f"  cuBLAS {theirs_us:8.1f} us ({tera / theirs_us:5.0f} TFLOP/s)"
                print(
                    f"{name:12} {kind:5} {count:5} tokens {ours_us:8.1f} us ({tera / ours_us:5.0f} TFLOP/s)  "
                    f"freest {freest_us:8.1f} us, {ours_us / freest_us:.3f} of it{against}",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="BF16,Q4_K", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--tokens", default="1,32,256,2048")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows = measure(arguments.formats.split(","), [int(count) for count in arguments.tokens.split(",")], arguments.runs)
    if arguments.json:
        arguments.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
