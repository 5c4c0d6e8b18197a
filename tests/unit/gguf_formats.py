"""The storage formats in numpy, independent of the engine: what a tensor's bytes mean, and bytes for given values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Format:
    """A storage format.

    Attributes:
        number: GGUF's tensor type.
        block_values: values in a block.
        block_bytes: bytes in a block.
        pack: float32 `[blocks, block_values]` to bytes `[blocks, block_bytes]`, near the values but not the best fit.
        unpack: the inverse, exact.
    """

    number: int
    block_values: int
    block_bytes: int
    pack: Callable[[Floats], Bytes]
    unpack: Callable[[Bytes], Floats]


def _bytes_of(values: npt.NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(values).view(np.uint8).reshape(values.shape[0], -1)


def _f16(block: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(block[:, at : at + 2]).view(np.float16).astype(np.float32)


def _inverse(scale: Floats) -> Floats:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def _stored(scale: Floats) -> tuple[Bytes, Floats]:
    """A scale `[blocks, 1]` as F16 bytes, and the value those bytes have."""
    half = scale.astype(np.float16)
    return _bytes_of(half), half.astype(np.float32)


def _nibbles(codes: npt.NDArray[np.uint8]) -> Bytes:
    """Codes `[blocks, 32]` below 16: byte i holds codes i and i + 16."""
    return (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)


def _codes(nibbles: Bytes) -> npt.NDArray[np.uint8]:
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=1)


def _fifth_bits(codes: npt.NDArray[np.uint8]) -> Bytes:
    return np.packbits(codes >> 4 & 1, axis=1, bitorder="little")


def _with_fifth_bits(codes: npt.NDArray[np.uint8], bits: Bytes) -> npt.NDArray[np.uint8]:
    return (codes | np.unpackbits(bits, axis=1, bitorder="little") << 4).astype(np.uint8)


def _pack_bf16(x: Floats) -> Bytes:
    bits = x.view(np.uint32)
    return _bytes_of(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def _unpack_bf16(block: Bytes) -> Floats:
    return (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _pack_q8_0(x: Floats) -> Bytes:
    stored, scale = _stored(np.abs(x).max(axis=1, keepdims=True) / 127)
    codes = np.clip(np.rint(x * _inverse(scale)), -127, 127).astype(np.int8)
    return np.concatenate([stored, codes.view(np.uint8)], axis=1)


def _unpack_q8_0(block: Bytes) -> Floats:
    return _f16(block, 0) * block[:, 2:].view(np.int8).astype(np.float32)


def _symmetric(x: Floats, bits: int) -> tuple[Bytes, npt.NDArray[np.uint8]]:
    middle = 1 << (bits - 1)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    stored, scale = _stored(largest / np.float32(-middle))
    return stored, np.clip(np.rint(x * _inverse(scale)) + middle, 0, 2 * middle - 1).astype(np.uint8)


def _affine(x: Floats, bits: int) -> tuple[Bytes, npt.NDArray[np.uint8]]:
    low = x.min(axis=1, keepdims=True)
    stored, scale = _stored((x.max(axis=1, keepdims=True) - low) / ((1 << bits) - 1))
    stored_low, low = _stored(low)
    codes = np.clip(np.rint((x - low) * _inverse(scale)), 0, (1 << bits) - 1).astype(np.uint8)
    return np.concatenate([stored, stored_low], axis=1), codes


def _pack_q4_0(x: Floats) -> Bytes:
    head, codes = _symmetric(x, 4)
    return np.concatenate([head, _nibbles(codes)], axis=1)


def _unpack_q4_0(block: Bytes) -> Floats:
    return _f16(block, 0) * (_codes(block[:, 2:]).astype(np.float32) - 8)


def _pack_q4_1(x: Floats) -> Bytes:
    head, codes = _affine(x, 4)
    return np.concatenate([head, _nibbles(codes)], axis=1)


def _unpack_q4_1(block: Bytes) -> Floats:
    return _f16(block, 0) * _codes(block[:, 4:]).astype(np.float32) + _f16(block, 2)


def _pack_q5_0(x: Floats) -> Bytes:
    head, codes = _symmetric(x, 5)
    return np.concatenate([head, _fifth_bits(codes), _nibbles(codes & np.uint8(15))], axis=1)


def _unpack_q5_0(block: Bytes) -> Floats:
    codes = _with_fifth_bits(_codes(block[:, 6:]), block[:, 2:6])
    return _f16(block, 0) * (codes.astype(np.float32) - 16)


def _pack_q5_1(x: Floats) -> Bytes:
    head, codes = _affine(x, 5)
    return np.concatenate([head, _fifth_bits(codes), _nibbles(codes & np.uint8(15))], axis=1)


def _unpack_q5_1(block: Bytes) -> Floats:
    codes = _with_fifth_bits(_codes(block[:, 8:]), block[:, 4:8])
    return _f16(block, 0) * codes.astype(np.float32) + _f16(block, 2)


def _grouped(x: Floats, bits: int) -> tuple[Bytes, npt.NDArray[np.uint8]]:
    """Header (scales, 6-bit group scales and minimums) and codes `[blocks, 8, 32]` of the K formats with minimums."""
    groups = x.reshape(-1, 8, 32)
    low = np.maximum(0, -groups.min(axis=2))
    spread = (groups.max(axis=2) + low) / ((1 << bits) - 1)
    stored, scale = _stored(spread.max(axis=1, keepdims=True) / 63)
    stored_low, low_scale = _stored(low.max(axis=1, keepdims=True) / 63)
    s = np.clip(np.rint(spread * _inverse(scale)), 0, 63).astype(np.uint8)
    m = np.clip(np.rint(low * _inverse(low_scale)), 0, 63).astype(np.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    third = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    shifted = groups + (low_scale * m)[:, :, None]
    codes = np.clip(np.rint(shifted * _inverse((scale * s).astype(np.float32))[:, :, None]), 0, (1 << bits) - 1)
    return np.concatenate([stored, stored_low, first, second, third], axis=1), codes.astype(np.uint8)


def group_head(block: Bytes) -> tuple[Floats, Floats, Floats, Floats]:
    """What Q4_K and Q5_K begin with: scale and minimum of the block, by which the groups' integers of 6 bits count."""
    first, second, third = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    s = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    m = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return _f16(block, 0), _f16(block, 2), s.astype(np.float32), m.astype(np.float32)


def _group_scales(block: Bytes) -> tuple[Floats, Floats]:
    scale, minimum, s, m = group_head(block)
    return scale * s, minimum * m


def _group_nibbles(codes: npt.NDArray[np.uint8]) -> Bytes:
    return (codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4).astype(np.uint8).reshape(-1, 128)


def group_codes(nibbles: Bytes) -> npt.NDArray[np.uint8]:
    pairs = nibbles.reshape(-1, 4, 32)
    return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)


def _pack_q4_k(x: Floats) -> Bytes:
    head, codes = _grouped(x, 4)
    return np.concatenate([head, _group_nibbles(codes)], axis=1)


def _unpack_q4_k(block: Bytes) -> Floats:
    scale, minimum = _group_scales(block)
    codes = group_codes(block[:, 16:]).astype(np.float32)
    return (scale[:, :, None] * codes - minimum[:, :, None]).reshape(-1, 256)


def _pack_q5_k(x: Floats) -> Bytes:
    head, codes = _grouped(x, 5)
    fifth = np.packbits(codes >> 4 & 1, axis=1, bitorder="little").reshape(-1, 32)
    return np.concatenate([head, fifth, _group_nibbles(codes)], axis=1)


def _unpack_q5_k(block: Bytes) -> Floats:
    scale, minimum = _group_scales(block)
    fifth = np.unpackbits(block[:, 16:48].reshape(-1, 1, 32), axis=1, bitorder="little")
    codes = (group_codes(block[:, 48:]) | fifth << 4).astype(np.float32)
    return (scale[:, :, None] * codes - minimum[:, :, None]).reshape(-1, 256)


def _pack_q6_k(x: Floats) -> Bytes:
    groups = x.reshape(-1, 16, 16)
    wanted = np.abs(groups).max(axis=2) / 31
    stored, scale = _stored(wanted.max(axis=1, keepdims=True) / 127)
    s = np.clip(np.rint(wanted * _inverse(scale)), -128, 127).astype(np.int8)
    inverse = _inverse((scale * s).astype(np.float32))
    codes = (np.clip(np.rint(groups * inverse[:, :, None]), -32, 31) + 32).astype(np.uint8)
    quarters = codes.reshape(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15 | (quarters[:, :, 2:] & 15) << 4).reshape(-1, 128)
    top = quarters >> 4
    high = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    return np.concatenate([low, high.reshape(-1, 64), s.view(np.uint8), stored], axis=1)


def _unpack_q6_k(block: Bytes) -> Floats:
    low = block[:, :128].reshape(-1, 2, 2, 32)
    high = block[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = np.concatenate([low & 15, low >> 4], axis=2) | high << 4
    scale = _f16(block, 208) * np.ascontiguousarray(block[:, 192:208]).view(np.int8).astype(np.float32)
    centred = codes.reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    values: Floats = scale[:, :, None] * centred
    return values.reshape(-1, 256)


FORMATS = {
    "F32": Format(0, 1, 4, lambda x: _bytes_of(x), lambda b: b.view(np.float32)),
    "F16": Format(1, 1, 2, lambda x: _bytes_of(x.astype(np.float16)), lambda b: b.view(np.float16).astype(np.float32)),
    "Q4_0": Format(2, 32, 18, _pack_q4_0, _unpack_q4_0),
    "Q4_1": Format(3, 32, 20, _pack_q4_1, _unpack_q4_1),
    "Q5_0": Format(6, 32, 22, _pack_q5_0, _unpack_q5_0),
    "Q5_1": Format(7, 32, 24, _pack_q5_1, _unpack_q5_1),
    "Q8_0": Format(8, 32, 34, _pack_q8_0, _unpack_q8_0),
    "Q4_K": Format(12, 256, 144, _pack_q4_k, _unpack_q4_k),
    "Q5_K": Format(13, 256, 176, _pack_q5_k, _unpack_q5_k),
    "Q6_K": Format(14, 256, 210, _pack_q6_k, _unpack_q6_k),
    "BF16": Format(30, 1, 2, _pack_bf16, _unpack_bf16),
}


def quantize(name: str, values: Floats) -> bytes:
    """`values` as rows of the format; the last dimension must be a whole number of blocks."""
    row = FORMATS[name]
    if values.shape[-1] % row.block_values:
        raise ValueError(f"{name} rows are multiples of {row.block_values} values, not {values.shape[-1]}")
    return row.pack(np.ascontiguousarray(values, np.float32).reshape(-1, row.block_values)).tobytes()


def dequantize(name: str, data: bytes, shape: tuple[int, ...]) -> Floats:
    """The float32 values that `data` stands for, exactly; `shape` has the fastest-varying dimension last."""
    row = FORMATS[name]
    values: Floats = row.unpack(np.frombuffer(data, np.uint8).reshape(-1, row.block_bytes)).reshape(shape)
    return values
