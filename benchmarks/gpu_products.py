"""Times the matrix products of a GPU: ours, ours without the promise of equal bits for any batch, and cuBLAS's.

    python -m benchmarks.gpu_products [--matrices PATTERN] [--tokens 1,32,256,2048] [--json FILE]
    python -m benchmarks.gpu_products --by-splits [--matrices PATTERN] …

`freest` is the fastest of our kernels over all ways to cut the sums, chosen anew for every number of tokens: what one
would run if the bytes of an answer might depend on its company. What the product runs cuts them by the weight's shape
and format. cuBLAS multiplies the same values in FP16 and chooses freely. Medians of `--runs` runs of ten products of
one matrix, which therefore lies in the second-level cache if it fits.

With `--by-splits`, the time of each number of splits of the inputs, and of the one that the product runs: by these
`choose_splits` (native/cuda/packed_matrix.cu) was written.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.random_blocks import FORMATS, random_blocks

# The kernels' hook and cuBLAS belong to the tests of the GPU.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from gpu.cublas import Cublas, find_cublas
from gpu.kernel_hook import KERNELS, NARROW, library_path, matmul


@dataclass(frozen=True, slots=True)
class Shape:
    """A weight matrix; of a gated pair, one of the two."""

    outputs: int
    inputs: int
    gated: bool = False


# Of Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B.
SHAPES = {
    "0.5B q,k,v": Shape(1152, 896),
    "0.5B output": Shape(896, 896),
    "0.5B gate,up": Shape(4864, 896, gated=True),
    "0.5B down": Shape(896, 4864),
    "1B q,k,v": Shape(3072, 2048),
    "1B output": Shape(2048, 2048),
    "1B gate,up": Shape(8192, 2048, gated=True),
    "1B down": Shape(2048, 8192),
    "8B q,k,v": Shape(6144, 4096),
    "8B output": Shape(4096, 4096),
    "8B gate,up": Shape(14336, 4096, gated=True),
    "8B down": Shape(4096, 14336),
}
DEFAULT_SHAPES = ("0.5B q,k,v", "0.5B down", "8B q,k,v", "8B down")
FREE_SPLITS = (1, 2, 4, 8, 16)
ALL_SPLITS = tuple(range(1, 17))
MOST_NARROW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Product:
    """Random weights of a shape and format, and inputs of some tokens."""

    name: str
    format: str
    tokens: int
    shape: Shape
    weights: bytes
    up: bytes | None
    inputs: np.ndarray

    def time_us(self, runs: int, kernel: int = -1, num_splits: int = 0) -> float:
        """Microseconds; of the backend's own choice where `kernel` is -1 and `num_splits` 0."""
        _, median_us = matmul(
            self.format,
            self.weights,
            self.inputs,
            self.shape.outputs,
            up=self.up,
            kernel=kernel,
            repeats=runs,
            num_splits=num_splits,
        )
        return median_us

    def tera_operations(self) -> float:
        return 2e-12 * self.shape.outputs * self.shape.inputs * self.tokens * (2 if self.shape.gated else 1)


def products(names: list[str], formats: list[str], tokens: list[int]) -> Iterator[Product]:
    """Those of formats whose blocks a row of the matrix fills."""
    random = np.random.default_rng(1)
    for name in names:
        shape = SHAPES[name]
        fitting = [kind for kind in formats if shape.inputs % FORMATS[kind].block_values == 0]
        count = shape.outputs * shape.inputs
        stored = {kind: random_blocks(kind, count, 1 / 64, random).tobytes() for kind in fitting}
        for num_tokens in tokens:
            inputs = random.standard_normal((num_tokens, shape.inputs)).astype(np.float16).astype(np.float32)
            for kind in fitting:
                up = stored[kind] if shape.gated else None
                yield Product(name, kind, num_tokens, shape, stored[kind], up, inputs)


class CublasTimes:
    """Of products of the same shapes in FP16, of a gated pair both matrices as one. Each is measured once."""

    def __init__(self, library: Cublas, runs: int) -> None:
        self._library = library
        self._runs = runs
        self._name = ""
        self._halves = np.empty((0, 0), np.float16)
        self._found: dict[tuple[str, int], float] = {}

    def of(self, product: Product) -> float:
        key = product.name, product.tokens
        if key not in self._found:
            if product.name != self._name:
                outputs = product.shape.outputs * (2 if product.shape.gated else 1)
                values = np.random.default_rng(2).standard_normal((outputs, product.shape.inputs))
                self._name, self._halves = product.name, (values / 64).astype(np.float16)
            _, median_us = self._library.product(self._halves, product.inputs.astype(np.float16), self._runs)
            self._found[key] = median_us
        return self._found[key]


def compare(product: Product, cublas: CublasTimes | None, runs: int) -> dict[str, object]:
    ours_us = product.time_us(runs)
    kernels = [kernel for kernel in KERNELS if kernel != NARROW or product.tokens <= MOST_NARROW_TOKENS]
    freest_us = min(ours_us, *(product.time_us(runs, kernel, splits) for kernel in kernels for splits in FREE_SPLITS))
    theirs_us = None if cublas is None else cublas.of(product)
    tera = product.tera_operations() * 1e6
    against = "" if theirs_us is None else f"  cuBLAS {theirs_us:8.1f} us ({tera / theirs_us:5.0f} TFLOP/s)"
    print(
        f"{product.name:12} {product.format:5} {product.tokens:5} tokens {ours_us:8.1f} us "
        f"({tera / ours_us:5.0f} TFLOP/s)  freest {freest_us:8.1f} us, {ours_us / freest_us:.3f} of it{against}",
        flush=True,
    )
    return {
        "matrix": product.name,
        "format": product.format,
        "tokens": product.tokens,
        "us": round(ours_us, 2),
        "freest_us": round(freest_us, 2),
        "cublas_us": None if theirs_us is None else round(theirs_us, 2),
        "tflops": round(tera / ours_us, 1),
    }


def by_splits(product: Product, runs: int) -> dict[str, object]:
    steps = -(-product.shape.inputs // 64)
    own_us = product.time_us(runs)
    times = {splits: round(product.time_us(runs, num_splits=splits), 2) for splits in ALL_SPLITS if splits <= steps}
    each = " ".join(f"{splits}: {time:.1f}" for splits, time in times.items())
    print(f"{product.name:12} {product.format:5} {product.tokens:5} tokens {own_us:8.1f} us  {each}", flush=True)
    return {
        "matrix": product.name,
        "format": product.format,
        "tokens": product.tokens,
        "us": round(own_us, 2),
        "us_by_splits": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", help=f"of {', '.join(SHAPES)}; `*` stands for anything")
    parser.add_argument("--by-splits", action="store_true", help="the time of each number of splits instead")
    parser.add_argument("--formats", default="BF16,Q4_K", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--tokens", default="1,32,256,2048")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    names = list(DEFAULT_SHAPES) if arguments.matrices is None else fnmatch.filter(SHAPES, arguments.matrices)
    formats = arguments.formats.split(",")
    if not names:
        parser.error(f"no matrix is called {arguments.matrices}")
    if unknown := [kind for kind in formats if kind not in FORMATS]:
        parser.error(f"no such format: {', '.join(unknown)}")
    if not library_path().exists():
        parser.error("this build has no CUDA library (TOKENWIRE_CUDA=ON builds it)")
    chosen = products(names, formats, [int(count) for count in arguments.tokens.split(",")])
    if arguments.by_splits:
        rows = [by_splits(product, arguments.runs) for product in chosen]
    else:
        found = find_cublas()
        cublas = None if found is None else CublasTimes(Cublas(found), arguments.runs)
        rows = [compare(product, cublas, arguments.runs) for product in chosen]
    if arguments.json:
        arguments.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
