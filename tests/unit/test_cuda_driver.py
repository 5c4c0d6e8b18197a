"""What is said of a driver that cannot be used: our loader and the real CUDA runtime over a scripted driver.

Only the library's probe is built here, not its kernels, so this takes seconds and needs no GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
PROGRAM = """
#include <cstdio>
#include "core/error.h"
#include "cuda/loader.h"

int main() {
  std::printf("%s\\n", tw::cuda::status().c_str());
  try {
    tw::cuda::make_backend(0);
  } catch (const tw::Error& error) {
    std::printf("%s %s\\n", tw::to_string(error.code()), error.what());
  }
}
"""

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to build the probe with")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that asks, its CUDA library beside it, and the scripted driver in the folder `driver`."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "driver").mkdir()
    (folder / "ask.cpp").write_text(PROGRAM)
    sources = [folder / "ask.cpp", NATIVE / "cuda/loader.cpp", NATIVE / "core/error.cpp"]
    include = ["-I", str(NATIVE)]
    probe, library = str(NATIVE / "cuda/device.cu"), str(folder / "libtokenwire_cuda.so")
    driver, fake = str(folder / "driver/libcuda.so.1"), str(Path(__file__).with_name("scripted_driver.c"))
    commands = [
        ["nvcc", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-cudart=static", *include, probe, "-o", library],
        ["c++", "-std=c++17", *include, *map(str, sources), "-ldl", "-o", str(folder / "ask")],
        ["cc", "-shared", "-fPIC", fake, "-o", driver],
    ]
    for command in commands:
        subprocess.run(command, check=True, timeout=100)
    return folder / "ask"


def ask(program: Path, driver: str, **answers: str) -> list[str]:
    """Status, then the error of a backend that is asked for all the same."""
    environment = {**os.environ, **answers, "LD_LIBRARY_PATH": str(program.parent / driver)}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"DRIVER_VERSION": "12040"}, "the NVIDIA driver supports CUDA 12.4, and CUDA 1"),
        ({"DRIVER_INIT": "100"}, "no CUDA device"),
        ({"DRIVER_INIT": "803"}, "unsupported display driver / cuda driver combination"),
        ({"DRIVER_INIT": "999"}, "unknown error"),
    ],
    ids=["old", "no-device", "mismatch", "unknown"],
)
def test_a_driver_that_cannot_be_used_is_explained(program: Path, answers: dict[str, str], reason: str) -> None:
    status, refusal = ask(program, "driver", **answers)
    assert reason in status
    assert refusal == f"UNAVAILABLE device cuda:0 is not usable: {status}"


def test_a_machine_without_a_driver_is_told_so(program: Path) -> None:
    if Path("/usr/lib/x86_64-linux-gnu/libcuda.so.1").exists():
        pytest.skip("this machine has a driver")
    assert ask(program, "nowhere")[0] == "no NVIDIA driver"


def test_a_library_of_another_version_is_refused(program: Path, tmp_path: Path) -> None:
    shutil.copytree(program.parent, tmp_path, dirs_exist_ok=True)
    other = tmp_path / "other.c"
    other.write_text("int tw_cuda_abi(void) { return 1; }\n")
    command = ["cc", "-shared", "-fPIC", str(other), "-o", str(tmp_path / "libtokenwire_cuda.so")]
    subprocess.run(command, check=True, timeout=60)
    assert ask(tmp_path / "ask", "driver")[0] == "libtokenwire_cuda.so belongs to another version of tokenwire"
