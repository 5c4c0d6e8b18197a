"""Calls the CUDA library's test entry: one matrix product with every pointer in host memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from tokenwire import _native
from unit.gguf_formats import FORMATS, Floats

# matmul.h's Kernel: for few tokens (kAuto with that layout), for many on any device, and for many on Hopper: flat, and
# tall with 32, 64 or 128 tokens a tile, dealt out whole, by pieces of the inputs (32, 64) or to pairs of blocks (128).
KERNELS = tuple(range(9))
NARROW = KERNELS[0]

_CHARS = ctypes.c_char * 64
_MESSAGE = ctypes.c_char * 1024


class _Failure(ctypes.Structure):
    _fields_ = (("code", _CHARS), ("message", _MESSAGE))


class _Matmul(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "num_rows", "num_cols", "num_tokens", "kernel", "scaled")),
        ("repeats", ctypes.c_int32),
        ("num_splits", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("weights", "up", "bias", "addend", "inputs", "out")),
        ("microseconds", ctypes.c_float),
    )


def library_path() -> Path:
    """Where the CUDA library is, if this build has one."""
    return Path(_native.__file__).with_name("libtokenwire_cuda.so")


def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_path()))
    loaded.tw_cuda_test_matmul.argtypes = (ctypes.POINTER(_Matmul), ctypes.POINTER(_Failure))
    return loaded


def matmul(
    dtype: str,
    weights: bytes,
    inputs: Floats,
    num_rows: int,
    *,
    up: bytes | None = None,
    bias: Floats | None = None,
    addend: Floats | None = None,
    kernel: int = -1,
    scaled: bool = False,
    repeats: int = 0,
    num_splits: int = 0,
) -> tuple[Floats, float]:
    """`inputs` `[tokens, cols]` times the transposed matrix; returns `[tokens, num_rows]` and microseconds a product.

    `kernel` is one of KERNELS, or -1 for the backend's own choice. `num_splits` other than 0 sums the inputs in so many
    pieces, as the product never would.

    Raises:
        RuntimeError: a call failed, or something around the output was touched.
    """
    tokens, cols = inputs.shape
    out = np.full((tokens, num_rows), np.nan, np.float32)
    kept = [np.ascontiguousarray(array, np.float32) for array in (inputs, bias, addend) if array is not None]
    pointers = iter(array.ctypes.data for array in kept)
    test = _Matmul(
        dtype=FORMATS[dtype].number,
        num_rows=num_rows,
        num_cols=cols,
        num_tokens=tokens,
        kernel=kernel,
        scaled=int(scaled),
        repeats=repeats,
        num_splits=num_splits,
        weights=ctypes.cast(ctypes.c_char_p(weights), ctypes.c_void_p),
        up=None if up is None else ctypes.cast(ctypes.c_char_p(up), ctypes.c_void_p),
        inputs=next(pointers),
        bias=None if bias is None else next(pointers),
        addend=None if addend is None else next(pointers),
        out=out.ctypes.data,
    )
    failure = _Failure()
    if library().tw_cuda_test_matmul(ctypes.byref(test), ctypes.byref(failure)) != 0:
        raise RuntimeError(f"{failure.code.decode()}: {failure.message.decode()}")
    return out, float(test.microseconds)
