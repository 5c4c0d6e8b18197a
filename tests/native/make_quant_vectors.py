"""Writes tests/native/quant_vectors.bin: blocks of every storage format and the values that they stand for.

The values come from the PyPI package `gguf` 0.19.0, so the engine's reference is held against somebody else's reading
of the formats. Run `python tests/native/make_quant_vectors.py` from the repository root, after `pip install gguf`.

Layout, little-endian, per format: type number, blocks, values a block (uint32 each), the blocks, the values (float32).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

NUM_VALUES = 1024
# Byte offsets of the F16 scales in a block; everything else is random bits, all of which are valid.
SCALES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def main() -> None:
    random = np.random.default_rng(20)
    out = b""
    for name in ("F32", "F16", "BF16", *SCALES):
        kind = GGMLQuantizationType[name]
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        num_blocks = NUM_VALUES // block_values
        if name in SCALES:
            blocks = random.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
            for at in SCALES[name]:
                scales = (random.standard_normal(num_blocks) * 0.1).astype(np.float16)
                scales[:3] = (0, -6e-8, 65504)  # zero, a subnormal, the largest
                blocks[:, at : at + 2] = scales.view(np.uint8).reshape(num_blocks, 2)
        else:
            values = random.standard_normal((num_blocks, 1)).astype(np.float32)
            half = values.view(np.uint32) >> 16
            by_name = {"F32": values, "F16": values.astype(np.float16), "BF16": half.astype(np.uint16)}
            blocks = np.ascontiguousarray(by_name[name]).view(np.uint8)
        expected = np.asarray(dequantize(blocks, kind), np.float32)
        assert expected.size == NUM_VALUES
        assert np.isfinite(expected).all()
        out += struct.pack("<III", kind.value, num_blocks, block_values) + blocks.tobytes() + expected.tobytes()
    Path(__file__).with_name("quant_vectors.bin").write_bytes(out)


if __name__ == "__main__":
    main()
