"""Writes tests/native/corpus/gguf: small valid and malformed files that the fuzzer starts from and gguf_test replays.

Run from the repository root: `PYTHONPATH=tests python tests/native/make_gguf_corpus.py`. A file whose name begins with
`valid` is accepted, every other one is refused.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from unit import gguf_builder as g
from unit.gguf_formats import FORMATS, quantize

CORPUS = Path(__file__).parent / "corpus" / "gguf"
F32 = FORMATS["F32"].number


def every_format() -> bytes:
    builder = g.FileBuilder()
    builder.add("general.architecture", g.STRING, "llama")
    random = np.random.default_rng(0)
    for name in FORMATS:
        values = random.standard_normal((1, 256)).astype(np.float32)
        builder.add_tensor(f"{name}.weight", (256,), name, quantize(name, values))
    return builder.build()


def every_value_type() -> bytes:
    keys = [g.kv(f"a{t}", t, 1) for t in range(13) if t not in (g.STRING, g.ARRAY)]
    keys += [g.kv_array(f"b{t}", t, [0, 1]) for t in range(13) if t not in (g.STRING, g.ARRAY)]
    keys += [g.kv("text", g.STRING, "hé"), g.kv_array("texts", g.STRING, ["", "x"]), g.kv_array("none", g.INT8, [])]
    return g.gguf(keys)


def one_tensor(dims: tuple[int, ...] = (4,), number: int = F32, offset: int = 0, data: bytes = bytes(32)) -> bytes:
    return g.gguf([], [g.tensor_info("w", dims, number, offset)], data)


def nested_array(depth: int) -> bytes:
    return g.kv_raw("x", g.ARRAY, (g.u32(g.ARRAY) + g.u64(1)) * depth)


def files() -> dict[str, bytes]:
    u32_key = g.kv("k", g.UINT32, 1)
    return {
        "valid-empty": g.gguf(),
        "valid-formats": every_format(),
        "valid-values": every_value_type(),
        "valid-dims": one_tensor((2, 1, 2, 2)),
        "valid-alignment": g.gguf(
            [g.kv("general.alignment", g.UINT32, 1)], [g.tensor_info("w", (1,), F32, 3)], bytes(7), alignment=1
        ),
        "valid-trailing": one_tensor() + b"junk",
        "magic": g.gguf(magic=b"FUGG"),
        "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "version": g.gguf(version=4),
        "tensors-bomb": g.gguf(n_tensors=2**64 - 1),
        "keys-bomb": g.gguf(n_kv=2**63),
        "key-length-bomb": g.header(0, 1) + g.u64(2**63) + bytes(19),
        "string-length-bomb": g.gguf([g.kv_raw("k", g.STRING, g.u64(2**64 - 8))]),
        "array-length-bomb": g.gguf([g.kv_raw("k", g.ARRAY, g.u32(g.UINT64) + g.u64(2**62))]),
        "nested-array": g.gguf([nested_array(100)]),
        "value-type": g.gguf([g.kv_raw("k", 13, bytes(8))]),
        "bool": g.gguf([g.kv("k", g.BOOL, 2)]),
        "twice": g.gguf([u32_key, u32_key]),
        "alignment-zero": g.gguf([g.kv("general.alignment", g.UINT32, 0)]),
        "split": g.gguf([g.kv("split.count", g.UINT16, 2)]),
        "no-dims": one_tensor(()),
        "empty-dim": one_tensor((4, 0)),
        "dims-wrap": one_tensor((2**42 + 1, 2**22)),
        "block": one_tensor((33,), FORMATS["Q4_0"].number),
        "removed-type": one_tensor((32,), 4),
        "unaligned": one_tensor(offset=4),
        "offset-wrap": one_tensor(offset=2**64 - 32),
        "short": one_tensor(data=bytes(15)),
        "overlap": g.gguf([], [g.tensor_info(n, (16,), F32, o) for n, o in (("a", 0), ("b", 32))], bytes(128)),
    }


if __name__ == "__main__":
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, data in files().items():
        (CORPUS / f"{name}.gguf").write_bytes(data)
