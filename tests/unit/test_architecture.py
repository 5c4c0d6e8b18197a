"""Who may import whom, and what no file may hold: docs/architecture.md as a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "service" / "tokenwire"
NATIVE = ROOT / "native"

# Each part of the package, and the other parts that it may import.
PYTHON_IMPORTS: dict[str, set[str]] = {
    "__init__": {"_version"},
    "__main__": {"cli"},
    "_version": set(),
    "v1": set(),
    "config": {"http_config"},
    "config_sources": {"config", "http_config"},
    "http_config": set(),
    "errors": set(),
    "stats": set(),
    "waiting": set(),
    "bounds": {"config"},
    "client": {"v1"},
    "bench": {"client"},
    "observe": {"config", "errors", "stats"},
    "security": {"observe", "config", "http_config", "errors"},
    "models": {"config", "errors", "_native"},
    "text": {"errors", "_native"},
    "engine": {"text", "models", "config", "errors", "stats", "waiting", "_native"},
    "rpc": {"security", "engine", "text", "bounds", "errors", "observe", "config", "waiting", "v1"},
    "gateway": {
        "process",
        "security",
        "client",
        "rpc",
        "bounds",
        "errors",
        "observe",
        "config",
        "http_config",
        "waiting",
        "v1",
    },
    "health_port": {"rpc", "config", "_native"},
    "ports": {"security", "rpc", "gateway", "health_port", "observe", "config"},
    "process": {"observe"},
    "startup": {"process", "rpc", "engine", "observe", "config", "errors"},
    "server": {"startup", "process", "ports", "security", "rpc", "engine", "observe", "config", "errors", "waiting"},
    "cli": {
        "security",
        "server",
        "process",
        "gateway",
        "client",
        "bench",
        "models",
        "bounds",
        "config",
        "config_sources",
        "http_config",
        "errors",
        "_native",
    },
}

# Parts that must not know a protocol or a library.
FOREIGN_TO: dict[str, set[str]] = {
    "engine": {"grpc", "google", "pydantic", "typer", "tokenizers"},
    "text": {"grpc", "google", "typer"},
    "models": {"grpc", "google", "typer"},
    "config": {"grpc", "google", "typer"},
    "errors": {"grpc", "google"},
    "security": {"grpc", "google", "typer"},
    "client": {"pydantic", "typer", "rich", "tokenizers", "structlog"},
    "bench": {"grpc", "google", "pydantic", "typer", "rich", "tokenizers", "structlog"},
    "cli": {"grpc", "google", "tokenizers"},
    "gateway": {"tokenizers"},
}

# Each room of the native code, and the others whose headers it may include.
NATIVE_INCLUDES: dict[str, set[str]] = {
    "core": set(),
    "gguf": {"core"},
    "quant": {"core"},
    "cpu": {"quant", "core"},
    "cuda": {"quant", "core"},
    "models": {"gguf", "quant", "core"},
    "engine": {"models", "gguf", "core"},
    "health": {"core"},
    "bindings": {"engine", "health", "models", "gguf", "core"},
}

# Of a backend, the rooms above it see its factory and its probe alone.
BACKEND_FACTORIES = {"cpu/cpu_backend.h", "cuda/cuda_backend.h", "cuda/loader.h"}
MAY_USE_FACTORIES = {"engine", "bindings"}

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
NATIVE_FILES = sorted(path for path in NATIVE.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})

# A file is read in a sitting: most stay below the guide, none goes beyond the limit (lines).
SIZE_GUIDES = [("python", PYTHON_FILES, 300, 400), ("native", NATIVE_FILES, 600, 800)]
SHARE_ABOVE_GUIDE = 0.1

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "imp"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, with its line; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: import absolutely"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def parts_imported(path: Path) -> Iterator[tuple[int, str]]:
    """The parts of our package that a file imports."""
    for line, module in imported_modules(path):
        names = module.split(".")
        if names[0] == "tokenwire" and names[1] in {*PYTHON_IMPORTS, "_native"}:
            yield line, names[1]


def test_there_is_something_to_check() -> None:
    assert len(PYTHON_FILES) > 20
    assert len(NATIVE_FILES) > 20


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in PYTHON_IMPORTS, f"{part} is new: say here, and in docs/architecture.md, what it may import"
    allowed = PYTHON_IMPORTS[part] | {part, "_version"}
    wrong = [f"line {line}: {part} imports {other}" for line, other in parts_imported(path) if other not in allowed]
    wrong += [
        f"line {line}: {part} imports {module}"
        for line, module in imported_modules(path)
        if module.split(".")[0] in FOREIGN_TO.get(part, set())
    ]
    assert wrong == []


def test_messages_and_engine_types_meet_in_one_place() -> None:
    # The servicer passes one on to the other; convert.py alone turns them into each other.
    both = {
        str(path.relative_to(PACKAGE))
        for path in PYTHON_FILES
        if {"v1", "engine"} <= {part for _, part in parts_imported(path)}
    }
    assert both <= {"rpc/convert.py", "rpc/inference.py"}


def test_the_gateway_shares_the_validator_and_nothing_else_of_the_worker() -> None:
    # It reaches the worker through gRPC alone, so that it runs the same apart from it.
    gateway = [path for path in PYTHON_FILES if part_of(path) == "gateway"]
    used = {module for path in gateway for _, module in imported_modules(path) if module.startswith("tokenwire.rpc")}
    assert {module.rpartition(".")[0] for module in used} == {"tokenwire.rpc.validate", "tokenwire.rpc.response_format"}


@pytest.mark.parametrize("path", NATIVE_FILES, ids=lambda path: str(path.relative_to(NATIVE)))
def test_native_includes_point_one_way(path: Path) -> None:
    room = path.relative_to(NATIVE).parts[0]
    assert room in NATIVE_INCLUDES, f"{room} is new: say here, and in docs/architecture.md, what it may include"
    wrong = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = re.match(r'\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', line)
        if found is None:
            continue
        ours, foreign = found.groups()
        if ours is not None:
            other = ours.split("/")[0]
            allowed = ("/" in ours and (other == room or other in NATIVE_INCLUDES[room])) or (
                ours in BACKEND_FACTORIES and room in MAY_USE_FACTORIES
            )
        else:
            allowed = (room == "bindings" or not foreign.startswith(("pybind11", "Python"))) and (
                room == "cuda" or not foreign.startswith(("cuda", "cublas"))
            )
        if not allowed:
            wrong.append(f"line {number}: {room} includes {ours or foreign}")
    assert wrong == []


@pytest.mark.parametrize(("kind", "files", "guide", "limit"), SIZE_GUIDES, ids=lambda value: str(value)[:8])
def test_files_are_read_in_a_sitting(kind: str, files: list[Path], guide: int, limit: int) -> None:
    sizes = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    beyond = {str(path): size for path, size in sizes.items() if size > limit}
    assert beyond == {}
    above = {str(path): size for path, size in sizes.items() if size > guide}
    assert len(above) <= SHARE_ABOVE_GUIDE * len(files), above


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_holds_what_is_forbidden(path: Path) -> None:
    wrong = [
        f"line {line}: imports {module}"
        for line, module in imported_modules(path)
        if module.split(".")[0] in FORBIDDEN_MODULES
    ]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            wrong.append(f"line {node.lineno}: bare except")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in FORBIDDEN_CALLS:
                wrong.append(f"line {node.lineno}: {node.func.id}()")
            if node.func.id == "print" and part_of(path) != "cli":
                wrong.append(f"line {node.lineno}: print() outside the command line")
    assert wrong == []


def test_the_rules_find_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    bad = tmp_path / "engine" / "bad.py"
    bad.parent.mkdir()
    for source in ("import tokenwire.rpc.x", "from tokenwire.v1 import inference_pb2", "import grpc.aio"):
        bad.write_text(source)
        with pytest.raises(AssertionError):
            test_python_imports_point_one_way(bad)
    for source in ("import pickle", "eval('1')", "print('x')", "try:\n  pass\nexcept:\n  pass"):
        bad.write_text(source)
        with pytest.raises(AssertionError):
            test_no_file_holds_what_is_forbidden(bad)
    monkeypatch.setitem(globals(), "NATIVE", tmp_path)
    header = tmp_path / "core" / "bad.h"
    header.parent.mkdir()
    for source in ('#include "cpu/ops.h"', '#include "bare.h"', "#include <pybind11/pybind11.h>"):
        header.write_text(source)
        with pytest.raises(AssertionError):
            test_native_includes_point_one_way(header)
