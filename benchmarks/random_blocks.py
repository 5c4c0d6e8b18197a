"""Random weights made directly as the bytes of each storage format, without a quantiser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Format:
    """A storage format: GGUF's number of it, and the values and bytes of a block."""

    number: int
    block_values: int
    block_bytes: int


FORMATS = {
    "F32": Format(0, 1, 4),
    "F16": Format(1, 1, 2),
    "Q4_0": Format(2, 32, 18),
    "Q5_0": Format(6, 32, 22),
    "Q5_1": Format(7, 32, 24),
    "Q8_0": Format(8, 32, 34),
    "Q4_K": Format(12, 256, 144),
    "Q5_K": Format(13, 256, 176),
    "Q6_K": Format(14, 256, 210),
    "BF16": Format(30, 1, 2),
}

# Formats of codes around a middle, with the bytes where a block's F16 scale lies.
_CENTRED_BITS = {"Q4_0": (4, 0), "Q5_0": (5, 0), "Q8_0": (8, 0), "Q6_K": (6, 208)}


def random_blocks(name: str, count: int, spread: float, random: np.random.Generator) -> Bytes:
    """Bytes of `count` values around 0 with a standard deviation near `spread`, a whole number of blocks."""
    if name in ("F32", "F16", "BF16"):
        return _floats(name, spread * random.standard_normal(count, np.float32))
    row = FORMATS[name]
    if count % row.block_values:
        raise ValueError(f"{count} values are no whole number of {name} blocks")
    num_blocks = count // row.block_values
    blocks = np.frombuffer(random.bytes(num_blocks * row.block_bytes), np.uint8).reshape(num_blocks, -1).copy()
    if name in _CENTRED_BITS:
        bits, at = _CENTRED_BITS[name]
        scale = np.full(num_blocks, spread / _deviation(bits), np.float32)
        if name == "Q6_K":
            # Group scales in ±[64, 127], whose own root mean square is near 97.
            blocks[:, 192:208] = blocks[:, 192:208] & 0xBF | 0x40
            negative = blocks[:, 192:208] >= 0x80
            blocks[:, 192:208] = np.where(negative, -(blocks[:, 192:208] & 0x7F).astype(np.int16), blocks[:, 192:208])
            scale /= 97
        # Codes average half a step below their middle; scales of both signs cancel it.
        _store_f16(blocks, at, np.where(blocks[:, 2] & 1, -scale, scale))
    elif name == "Q5_1":
        scale = np.full(num_blocks, spread / _deviation(5), np.float32)
        _store_f16(blocks, 0, scale)
        _store_f16(blocks, 2, -15.5 * scale)
    else:
        _group_scales(blocks, 4 if name == "Q4_K" else 5, spread)
    return blocks.reshape(-1)


def _deviation(bits: int) -> float:
    """The standard deviation of codes that are uniform over `bits` bits."""
    return float(np.sqrt((4**bits - 1) / 12))


def _floats(name: str, values: npt.NDArray[np.float32]) -> Bytes:
    if name == "F32":
        return values.view(np.uint8)
    if name == "F16":
        return values.astype(np.float16).view(np.uint8)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _store_f16(blocks: Bytes, at: int, values: npt.NDArray[np.float32]) -> None:
    blocks[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _group_scales(blocks: Bytes, bits: int, spread: float) -> None:
    """Scales in [32, 63], root mean square near 48.5, with equal minimums, so that every group averages 0."""
    scales = blocks[:, 4:12] & 31 | 32
    upper = scales[:, 4:] >> 4 << 6
    blocks[:, 4:8] = scales[:, :4] | upper
    blocks[:, 8:12] = scales[:, :4] | upper
    blocks[:, 12:16] = scales[:, 4:] & 15 | (scales[:, 4:] & 15) << 4
    scale = np.full(len(blocks), spread / _deviation(bits) / 48.5, np.float32)
    _store_f16(blocks, 0, scale)
    _store_f16(blocks, 2, (2**bits - 1) / 2 * scale)
