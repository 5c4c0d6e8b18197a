"""GGUF files written byte by byte: valid ones, wrong ones, and tiny models with random weights."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unit.gguf_formats import FORMATS, Floats, dequantize, quantize

# Value types, each with the struct code of a scalar.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
_CODES = dict(zip((UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL), "BbHhIifB", strict=True))
_CODES.update({UINT64: "Q", INT64: "q", FLOAT64: "d"})


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def scalar(value_type: int, value: float | str | bytes) -> bytes:
    if isinstance(value, str | bytes):
        return string(value)
    return struct.pack("<" + _CODES[value_type], value)


def kv(key: str | bytes, value_type: int, value: float | str | bytes) -> bytes:
    """A key with a scalar or a string."""
    return string(key) + u32(value_type) + scalar(value_type, value)


def kv_raw(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    """A key with a value given as bytes."""
    return string(key) + u32(value_type) + payload


def kv_array(key: str, element_type: int, values: Sequence[float] | Sequence[str], count: int | None = None) -> bytes:
    """A key with an array, which may declare another length than it has."""
    head = u32(element_type) + u64(len(values) if count is None else count)
    return kv_raw(key, ARRAY, head + b"".join(scalar(element_type, value) for value in values))


def tensor_info(
    name: str | bytes, dims: Sequence[int], type_number: int, offset: int, n_dims: int | None = None
) -> bytes:
    """A tensor's description; `dims` has the fastest-varying dimension first, `offset` counts from the data section."""
    count = u32(len(dims) if n_dims is None else n_dims)
    return string(name) + count + b"".join(u64(dim) for dim in dims) + u32(type_number) + u64(offset)


def pad(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def header(n_tensors: int, n_kv: int, *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + u32(version) + u64(n_tensors) + u64(n_kv)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    n_tensors: int | None = None,
    n_kv: int | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A file of these parts. Counts, magic and version can be set apart from what the file holds."""
    head = header(
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_kv is None else n_kv,
        magic=magic,
        version=version,
    )
    return pad(head + b"".join(keys) + b"".join(tensors), alignment) + data


@dataclass
class FileBuilder:
    """Collects keys and tensors of a well-formed file and lays out their data."""

    alignment: int = 32
    keys: list[bytes] = field(default_factory=list)
    infos: list[bytes] = field(default_factory=list)
    data: bytes = b""

    def add(self, key: str, value_type: int, value: float | str) -> None:
        self.keys.append(kv(key, value_type, value))

    def add_array(self, key: str, element_type: int, values: Sequence[float] | Sequence[str]) -> None:
        self.keys.append(kv_array(key, element_type, values))

    def add_tensor(self, name: str, dims: Sequence[int], dtype: str, data: bytes) -> None:
        self.infos.append(tensor_info(name, dims, FORMATS[dtype].number, len(self.data)))
        self.data += pad(data, self.alignment)

    def build(self) -> bytes:
        return gguf(self.keys, self.infos, self.data, alignment=self.alignment)


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE vocabulary: printable ones for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


_TEXT = "the and ing er on at en it is or te al ar st re GPU compute haiku write light stream token hello world"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_vocabulary(size: int | None = None) -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and token types of a byte-level BPE vocabulary, filled up to `size` with unused tokens."""
    tokens = [*SPECIAL_TOKENS, *byte_characters()]
    merges: list[str] = []
    words = _TEXT.split()
    for word in [*words, *("Ġ" + word for word in words)]:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
                tokens.append(word[:end])
    types = [3] * len(SPECIAL_TOKENS) + [1] * (len(tokens) - len(SPECIAL_TOKENS))
    if size is not None:
        if size < len(tokens):
            raise ValueError(f"a tiny vocabulary has at least {len(tokens)} tokens")
        unused = size - len(tokens)
        tokens += [f"<unused{i}>" for i in range(unused)]
        types += [5] * unused
    return tokens, merges, types


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model file and what it holds.

    Attributes:
        weights: float32 values exactly as stored, by tensor name, fastest-varying dimension last.
    """

    path: Path
    vocab_size: int
    weights: dict[str, Floats]


def tiny_llama(
    path: Path,
    *,
    architecture: str = "llama",
    dtype: str = "F32",
    n_layers: int = 2,
    n_embd: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    n_ff: int = 128,
    vocab: int | None = None,
    context: int = 256,
    rope_base: float = 10000.0,
    rope_factors: Sequence[float] = (),
    rms_eps: float = 1e-5,
    tied: bool = True,
    seed: int = 0,
    extra_keys: Sequence[bytes] = (),
    drop_keys: Sequence[str] = (),
    drop_tensors: Sequence[str] = (),
) -> TinyModel:
    """Writes a model of the Llama family with random weights; the same arguments give the same bytes.

    Args:
        architecture: `llama`, or `qwen2`, which adds biases to q, k and v.
        dtype: format of the matrices; norms are F32. Row lengths must be multiples of its block.
        vocab: vocabulary size; by default what the tiny vocabulary has.
        rope_factors: what each of the head's angles is divided by, `[head_dim / 2]`; written if given.
        tied: whether the output matrix is the token embedding.
        extra_keys: further keys as `kv` gives them; one that is there already is replaced.
        drop_keys, drop_tensors: left out.
    """
    head = n_embd // n_heads if head_dim is None else head_dim
    tokens, merges, types = tiny_vocabulary(vocab)
    builder = FileBuilder()
    builder.add("general.architecture", STRING, architecture)
    builder.add("general.name", STRING, "tiny")
    for key, value in {
        "block_count": n_layers,
        "context_length": context,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "rope.dimension_count": head,
        "vocab_size": len(tokens),
    }.items():
        builder.add(f"{architecture}.{key}", UINT32, value)
    if head_dim is not None:
        builder.add(f"{architecture}.attention.key_length", UINT32, head)
        builder.add(f"{architecture}.attention.value_length", UINT32, head)
    builder.add(f"{architecture}.rope.freq_base", FLOAT32, rope_base)
    builder.add(f"{architecture}.attention.layer_norm_rms_epsilon", FLOAT32, rms_eps)
    builder.add("tokenizer.ggml.model", STRING, "gpt2")
    builder.add("tokenizer.ggml.pre", STRING, "smollm")
    builder.add_array("tokenizer.ggml.tokens", STRING, tokens)
    builder.add_array("tokenizer.ggml.token_type", INT32, types)
    builder.add_array("tokenizer.ggml.merges", STRING, merges)
    builder.add("tokenizer.ggml.bos_token_id", UINT32, 1)
    builder.add("tokenizer.ggml.eos_token_id", UINT32, 2)
    builder.add("tokenizer.ggml.add_bos_token", BOOL, 0)
    builder.add("tokenizer.chat_template", STRING, CHAT_TEMPLATE)
    replaced = {_key_of(entry) for entry in extra_keys} | set(drop_keys)
    builder.keys = [entry for entry in builder.keys if _key_of(entry) not in replaced] + list(extra_keys)

    random = np.random.default_rng(seed)
    weights: dict[str, Floats] = {}

    def matrix(name: str, rows: int, cols: int) -> None:
        values = (random.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
        if name in drop_tensors:
            return
        data = quantize(dtype, values)
        builder.add_tensor(name, (cols, rows), dtype, data)
        weights[name] = dequantize(dtype, data, (rows, cols))

    def vector(name: str, values: Floats) -> None:
        if name in drop_tensors:
            return
        builder.add_tensor(name, values.shape, "F32", values.tobytes())
        weights[name] = values

    def norm(name: str) -> None:
        vector(name, (1 + 0.1 * random.standard_normal(n_embd)).astype(np.float32))

    def projection(name: str, rows: int) -> None:
        matrix(f"{name}.weight", rows, n_embd)
        if architecture == "qwen2":
            vector(f"{name}.bias", random.standard_normal(rows).astype(np.float32))

    matrix("token_embd.weight", len(tokens), n_embd)
    if rope_factors:
        vector("rope_freqs.weight", np.array(rope_factors, np.float32))
    for layer in range(n_layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        projection(f"{block}.attn_q", n_heads * head)
        projection(f"{block}.attn_k", n_kv_heads * head)
        projection(f"{block}.attn_v", n_kv_heads * head)
        matrix(f"{block}.attn_output.weight", n_embd, n_heads * head)
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.ffn_gate.weight", n_ff, n_embd)
        matrix(f"{block}.ffn_up.weight", n_ff, n_embd)
        matrix(f"{block}.ffn_down.weight", n_embd, n_ff)
    norm("output_norm.weight")
    if not tied:
        matrix("output.weight", len(tokens), n_embd)
    path.write_bytes(builder.build())
    return TinyModel(path, len(tokens), weights)


def _key_of(entry: bytes) -> str:
    (length,) = struct.unpack_from("<Q", entry)
    return entry[8 : 8 + length].decode()
