"""Engines broken on purpose, in a copy of the sources: what a gate is worth shows in what it catches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("CMakeLists.txt", "native", "protos", "service/tokenwire/_version.py")


@dataclass(frozen=True)
class Mutation:
    """One changed place of one file. `pattern` must match exactly once, or the mutation has to be written anew."""

    promise_broken: str
    file: str
    pattern: str
    replacement: str

    def apply(self, text: str) -> str:
        mutated, count = re.subn(self.pattern, self.replacement, text, flags=re.DOTALL)
        assert count == 1, f"{self.file} has {count} places for: {self.promise_broken}"
        return mutated


MUTATIONS = (
    Mutation(
        "partial attention is combined in another order when splits are computed side by side",
        "native/cpu/cpu_backend.cpp",
        r"for \(int32_t split = 0; split < splits_of\(tile\); \+\+split\)"
        r"(\s+\{\s+kernels_\.combine_splits\(\s*&total,)",
        r"for (int32_t split = splits_of(tile) - 1; split >= 0; --split)\1",
    ),
    Mutation(
        "a draw depends on the row that a sequence has in its step",
        "native/cpu/cpu_backend.cpp",
        r"(void CpuBackend::draw\(.*?)jobs\[static_cast<size_t>\(row\)\](,)",
        r"\1SampleJob{jobs[static_cast<size_t>(row)].params, jobs[static_cast<size_t>(row)].generated, "
        r"jobs[static_cast<size_t>(row)].token_index + static_cast<uint64_t>(row)}\2",
    ),
    Mutation(
        "the blocks of a matrix row are summed backwards if several rows are computed together",
        "native/cpu/matmul.cpp",
        r"(\nvoid rows_by_tiles\(.*?)for \(int64_t b = begin; b < end; \+\+b\)( \{\n)(?=.*?accumulate<)",
        r"\1for (int64_t b = end - 1; b >= begin; --b)\2",
    ),
    Mutation(
        "a preempted sequence forgets that it has drawn tokens",
        "native/engine/engine_step.cpp",
        r"static_cast<uint64_t>\(sequence\.length\(\) - sequence\.num_prompt_tokens\)",
        r"static_cast<uint64_t>(sequence.length() - sequence.num_prompt_tokens + "
        r"(scheduler_->num_preemptions() > 0 ? 1 : 0))",
    ),
)


class MutantBuild:
    """A copy of the engine's sources with a build folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._source = folder / "source"
        self._build = folder / "build"
        for name in COPIED:
            target = self._source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target)
            else:
                shutil.copyfile(ROOT / name, target)
        self._run(
            "cmake", "-S", self._source, "-B", self._build, "-G", "Ninja", "-DTOKENWIRE_CUDA=OFF",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )  # fmt: skip

    def compile(self, mutation: Mutation | None) -> Path:
        """The engine module with this mutation, or as it is."""
        if mutation is None:
            return self._compile()
        file = self._source / mutation.file
        original = file.read_text()
        file.write_text(mutation.apply(original))
        try:
            return self._compile()
        finally:
            file.write_text(original)

    def _compile(self) -> Path:
        self._run("cmake", "--build", self._build, "--target", "_native")
        (module,) = self._build.rglob("_native*.so")
        return module

    def _run(self, *command: str | Path) -> None:
        # CMake and Ninja stand beside the interpreter of a virtual environment.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
