"""Writes a GGUF model of a known shape with random weights, for benchmarks where the real file is not at hand.

    python -m benchmarks.make_model qwen2.5-0.5b q4_k_m /tmp/qwen.gguf

The time of a step does not depend on what the weights are, so such a file measures like the real one. Its formats are
chosen tensor by tensor as llama.cpp's quantiser would, and its vocabulary is valid, so `tokenwire serve` loads it; what
it writes is noise. The same arguments give the same bytes. Rows are written as they are made: memory stays small.
"""

from __future__ import annotations

import argparse
import math
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from benchmarks.random_blocks import FORMATS, random_blocks
from benchmarks.vocabularies import Vocabulary, llama3_vocabulary, qwen2_vocabulary

ALIGNMENT = 32
CHUNK_VALUES = 1 << 23
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True, slots=True)
class Shape:
    """What the file's `<architecture>.*` keys say, and how its vocabulary is made.

    Attributes:
        rope_stretch: factor of Llama 3's context extension from 8,192 tokens, or 0.
    """

    architecture: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    n_ff: int
    vocab_size: int
    context: int
    rope_base: float
    rms_eps: float
    vocabulary: Callable[[int], Vocabulary]
    tied: bool = True
    rope_stretch: float = 0.0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_heads


SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 14, 2, 4864, 151936, 32768, 1e6, 1e-6, qwen2_vocabulary),
    "llama-3.2-1b": Shape(
        "llama", 16, 2048, 32, 8, 8192, 128256, 131072, 5e5, 1e-5, llama3_vocabulary, rope_stretch=32.0
    ),
    "llama-3.1-8b": Shape(
        "llama", 32, 4096, 32, 8, 14336, 128256, 131072, 5e5, 1e-5, llama3_vocabulary, tied=False, rope_stretch=8.0
    ),
    # Small enough for tests; 128 columns force the same replacements of formats that 896 do.
    "tiny": Shape("qwen2", 4, 128, 4, 2, 512, 1024, 512, 1e6, 1e-6, qwen2_vocabulary),
    "tiny-256": Shape("qwen2", 4, 256, 4, 2, 512, 1024, 512, 1e6, 1e-6, qwen2_vocabulary),
}

# What a K format becomes in a matrix whose rows are no whole number of its blocks of 256.
_REPLACEMENTS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def _more_bits(layer: int, n_layers: int) -> bool:
    """Whether a layer is among the half whose sensitive matrices get more bits: its ends and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _is_head(name: str, shape: Shape) -> bool:
    return name == ("token_embd.weight" if shape.tied else "output.weight")


def _q4_0(name: str, layer: int, shape: Shape) -> str:
    return "Q6_K" if _is_head(name, shape) else "Q4_0"


def _q4_k_m(name: str, layer: int, shape: Shape) -> str:
    sensitive = name.endswith(("attn_v.weight", "ffn_down.weight")) and _more_bits(layer, shape.n_layers)
    return "Q6_K" if sensitive or _is_head(name, shape) else "Q4_K"


# The format of a matrix, given its name, its layer (-1 outside of any) and the shape; and general.file_type.
MIXES: dict[str, tuple[int, Callable[[str, int, Shape], str]]] = {
    "f16": (1, lambda name, layer, shape: "F16"),
    "bf16": (32, lambda name, layer, shape: "BF16"),
    "q8_0": (7, lambda name, layer, shape: "Q8_0"),
    "q4_0": (2, _q4_0),
    "q4_k_m": (15, _q4_k_m),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """`dims` has the fastest-varying dimension first; a vector is `centre` plus noise of the deviation `spread`."""

    name: str
    dims: tuple[int, ...]
    format: str
    centre: float = 0.0
    spread: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def num_bytes(self) -> int:
        row = FORMATS[self.format]
        return math.prod(self.dims) // row.block_values * row.block_bytes


def rope_factors(shape: Shape) -> tuple[float, ...]:
    """What each angle is divided by in Llama 3's context extension, `[head_dim / 2]`."""
    factors = []
    for i in range(shape.head_dim // 2):
        turns = 8192 / (2 * math.pi * shape.rope_base ** (2 * i / shape.head_dim))
        smooth = min(max((turns - 1) / 3, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / shape.rope_stretch + smooth))
    return tuple(factors)


def tensors_of(shape: Shape, mix: str) -> list[Tensor]:
    choose = MIXES[mix][1]
    found: list[Tensor] = []

    def matrix(name: str, rows: int, cols: int, layer: int = -1) -> None:
        chosen = choose(name, layer, shape)
        if cols % FORMATS[chosen].block_values:
            chosen = _REPLACEMENTS[chosen]
        found.append(Tensor(name, (cols, rows), chosen))

    matrix("token_embd.weight", shape.vocab_size, shape.n_embd)
    if shape.rope_stretch:
        factors = rope_factors(shape)
        found.append(Tensor("rope_freqs.weight", (len(factors),), "F32", values=factors))
    kv_rows = shape.n_kv_heads * shape.head_dim
    for layer in range(shape.n_layers):
        block = f"blk.{layer}"
        found.append(Tensor(f"{block}.attn_norm.weight", (shape.n_embd,), "F32", 1.0, 0.1))
        for part, rows in (("q", shape.n_embd), ("k", kv_rows), ("v", kv_rows)):
            matrix(f"{block}.attn_{part}.weight", rows, shape.n_embd, layer)
            if shape.architecture == "qwen2":
                found.append(Tensor(f"{block}.attn_{part}.bias", (rows,), "F32", 0.0, 0.1))
        matrix(f"{block}.attn_output.weight", shape.n_embd, shape.n_embd, layer)
        found.append(Tensor(f"{block}.ffn_norm.weight", (shape.n_embd,), "F32", 1.0, 0.1))
        matrix(f"{block}.ffn_gate.weight", shape.n_ff, shape.n_embd, layer)
        matrix(f"{block}.ffn_up.weight", shape.n_ff, shape.n_embd, layer)
        matrix(f"{block}.ffn_down.weight", shape.n_embd, shape.n_ff, layer)
    found.append(Tensor("output_norm.weight", (shape.n_embd,), "F32", 1.0, 0.1))
    if not shape.tied:
        matrix("output.weight", shape.vocab_size, shape.n_embd)
    return found


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _key(name: str, value: bool | int | float | str) -> bytes:
    if isinstance(value, bool):
        return _string(name) + struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return _string(name) + struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return _string(name) + struct.pack("<If", FLOAT32, value)
    return _string(name) + struct.pack("<I", STRING) + _string(value)


def _strings_key(name: str, values: list[str]) -> bytes:
    return _string(name) + struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(map(_string, values))


def keys_of(name: str, shape: Shape, mix: str) -> list[bytes]:
    vocabulary = shape.vocabulary(shape.vocab_size)
    prefix = shape.architecture
    values: dict[str, bool | int | float | str] = {
        "general.architecture": prefix,
        "general.name": f"{name}, random weights",
        "general.file_type": MIXES[mix][0],
        "general.quantization_version": 2,
        f"{prefix}.block_count": shape.n_layers,
        f"{prefix}.context_length": shape.context,
        f"{prefix}.embedding_length": shape.n_embd,
        f"{prefix}.feed_forward_length": shape.n_ff,
        f"{prefix}.attention.head_count": shape.n_heads,
        f"{prefix}.attention.head_count_kv": shape.n_kv_heads,
        f"{prefix}.attention.layer_norm_rms_epsilon": shape.rms_eps,
        f"{prefix}.rope.dimension_count": shape.head_dim,
        f"{prefix}.rope.freq_base": shape.rope_base,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.bos_token_id": vocabulary.bos_id,
        "tokenizer.ggml.eos_token_id": vocabulary.eos_id,
        "tokenizer.ggml.add_bos_token": vocabulary.add_bos,
        "tokenizer.chat_template": vocabulary.chat_template,
    }
    types = struct.pack(f"<{len(vocabulary.types)}i", *vocabulary.types)
    return [
        *(_key(key, value) for key, value in values.items()),
        _strings_key("tokenizer.ggml.tokens", vocabulary.tokens),
        _string("tokenizer.ggml.token_type") + struct.pack("<IIQ", ARRAY, INT32, len(vocabulary.types)) + types,
        _strings_key("tokenizer.ggml.merges", vocabulary.merges),
    ]


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _data_of(tensor: Tensor, random: np.random.Generator) -> Iterator[npt.NDArray[np.uint8]]:
    if tensor.values:
        yield np.array(tensor.values, np.float32).view(np.uint8)
        return
    if len(tensor.dims) == 1:
        values = tensor.centre + tensor.spread * random.standard_normal(tensor.dims[0], np.float32)
        yield values.astype(np.float32).view(np.uint8)
        return
    cols, rows = tensor.dims
    step = max(1, CHUNK_VALUES // cols)
    for row in range(0, rows, step):
        yield random_blocks(tensor.format, min(step, rows - row) * cols, 1 / math.sqrt(cols), random)


def write_model(file: BinaryIO, name: str, mix: str, seed: int) -> int:
    """Writes the whole file and returns its size in bytes."""
    shape = SHAPES[name]
    tensors = tensors_of(shape, mix)
    keys = keys_of(name, shape, mix)
    infos, offset = [], 0
    for tensor in tensors:
        head = _string(tensor.name) + struct.pack("<I", len(tensor.dims))
        dims = struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims)
        infos.append(head + dims + struct.pack("<IQ", FORMATS[tensor.format].number, offset))
        offset += _padded(tensor.num_bytes)
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(infos)
    file.write(start.ljust(_padded(len(start)), b"\0"))

    random = np.random.default_rng(seed)
    for tensor in tensors:
        written = 0
        for data in _data_of(tensor, random):
            file.write(data.data)
            written += data.nbytes
        if written != tensor.num_bytes:
            raise RuntimeError(f"{tensor.name}: {written} bytes instead of {tensor.num_bytes}")
        file.write(bytes(_padded(written) - written))
    return _padded(len(start)) + offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("mix", choices=MIXES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    partial = arguments.path.with_name(arguments.path.name + ".partial")
    with partial.open("wb") as file:
        size = write_model(file, arguments.shape, arguments.mix, arguments.seed)
    partial.replace(arguments.path)
    by_format: dict[str, int] = {}
    for tensor in tensors_of(SHAPES[arguments.shape], arguments.mix):
        by_format[tensor.format] = by_format.get(tensor.format, 0) + tensor.num_bytes
    parts = ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in sorted(by_format.items()))
    print(f"{arguments.path}: {size / 1e6:.1f} MB ({parts})", file=sys.stderr)


if __name__ == "__main__":
    main()
