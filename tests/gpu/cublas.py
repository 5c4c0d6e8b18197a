"""Matrix products by cuBLAS, where a machine has it: an oracle for our kernels and a mark to measure them by.

Found at run time: TOKENWIRE_CUBLAS names the library, else the loader's path and CUDA's usual folder are searched.
Memory and clocks are the driver's, so nothing but the two libraries is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
from typing import Any

import numpy as np
import numpy.typing as npt

Halves = npt.NDArray[np.float16]

NAMES = (
    "libcublas.so.13",
    "libcublas.so.12",
    "/usr/local/cuda/lib64/libcublas.so.13",
    "/usr/local/cuda/lib64/libcublas.so",
)

# cublas_api.h and library_types.h
_OP_N, _OP_T = 0, 1
_R_32F, _R_16F = 0, 2
_COMPUTE_32F = 68
_GEMM_DEFAULT = -1  # cuBLAS's own choice for the shape


def find_cublas() -> ctypes.CDLL | None:
    """The library, or None."""
    named = os.environ.get("TOKENWIRE_CUBLAS")
    for name in (named,) if named else NAMES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


class Cublas:
    """A handle on device 0's primary context; belongs to the thread that made it.

    Raises:
        RuntimeError: a call failed.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._driver = ctypes.CDLL("libcuda.so.1")
        device, context, handle = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._check("cublasCreate_v2", library.cublasCreate_v2(ctypes.byref(handle)))
        self._handle = handle

    def product(self, weights: Halves, inputs: Halves, repeats: int = 0) -> tuple[npt.NDArray[np.float32], float]:
        """`inputs` `[tokens, cols]` times the transposed `weights` `[rows, cols]`, summed in FP32.

        Returns:
            `[tokens, rows]`, and the median microseconds of `repeats` runs of ten products.
        """
        (rows, cols), tokens = weights.shape, inputs.shape[0]
        out = np.empty((tokens, rows), np.float32)
        with contextlib.ExitStack() as stack:
            device_weights, device_inputs = self._upload(weights, stack), self._upload(inputs, stack)
            device_out = self._allocate(out.nbytes, stack)
            one, zero = ctypes.c_float(1), ctypes.c_float(0)

            def run() -> None:
                status = self._library.cublasGemmEx(
                    self._handle,
                    *(_OP_T, _OP_N, rows, tokens, cols),
                    *(ctypes.byref(one), device_weights, _R_16F, cols, device_inputs, _R_16F, cols),
                    *(ctypes.byref(zero), device_out, _R_32F, rows, _COMPUTE_32F, _GEMM_DEFAULT),
                )
                self._check("cublasGemmEx", status)

            run()
            self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(out.ctypes.data), device_out, ctypes.c_size_t(out.nbytes))
            times = [self._timed_us(run) / 10 for _ in range(repeats)]
        return out, statistics.median(times) if times else 0.0

    def _timed_us(self, run: Any) -> float:
        """Of ten runs, microseconds."""
        begin, end, elapsed_ms = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (begin, end):
            self._call("cuEventCreate", ctypes.byref(event), 0)
        self._call("cuEventRecord", begin, None)
        for _ in range(10):
            run()
        self._call("cuEventRecord", end, None)
        self._call("cuEventSynchronize", end)
        self._call("cuEventElapsedTime", ctypes.byref(elapsed_ms), begin, end)
        for event in (begin, end):
            self._call("cuEventDestroy_v2", event)
        return elapsed_ms.value * 1e3

    def _upload(self, data: Halves, stack: contextlib.ExitStack) -> ctypes.c_uint64:
        data = np.ascontiguousarray(data)
        pointer = self._allocate(data.nbytes, stack)
        self._call("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))
        return pointer

    def _allocate(self, num_bytes: int, stack: contextlib.ExitStack) -> ctypes.c_uint64:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        stack.callback(self._call, "cuMemFree_v2", pointer)
        return pointer

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._driver, name)(*arguments))

    @staticmethod
    def _check(name: str, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"{name} failed with {status}")
