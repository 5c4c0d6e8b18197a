"""What is built: the wheel's and the sdist's contents, and the compiled module against its stub file."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tokenwire import __version__, _native

ROOT = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 900


def build(kind: str, directory: Path) -> Path:
    """Builds `wheel` or `sdist` with the tools that are installed. A wheel reuses what `make setup` compiled."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(directory), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (built,) = directory.iterdir()
    return built


@pytest.mark.slow
@pytest.mark.timeout(BUILD_TIMEOUT_S)
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
    for name in ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py", "__init__.py"):
        assert f"tokenwire/v1/{name}" in names
    for name in ("py.typed", "_native.pyi", "__main__.py", "cli/main.py", "client/__init__.py"):
        assert f"tokenwire/{name}" in names
    info = f"tokenwire-{__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/entry_points.txt"} <= names
    binaries = {name for name in names if ".so" in name}
    assert {name.split(".")[0] for name in binaries} <= {"tokenwire/_native", "tokenwire/libtokenwire_cuda"}
    assert any(name.startswith("tokenwire/_native.") for name in binaries)
    assert {name.split("/")[0] for name in names} == {"tokenwire", info}
    kinds = {Path(name).suffix for name in names if name.startswith("tokenwire/")}
    page = {".css", ".html", ".js", ".svg"}
    assert kinds <= {".py", ".pyi", ".so", ".typed"} | page
    assert f"Version: {__version__}" in text
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Dist: grpcio<2,>=" in text


def test_the_sdist_holds_the_sources_and_no_build_output(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for name in (
        "CMakeLists.txt",
        "pyproject.toml",
        "LICENSE",
        "NOTICE",
        "README.md",
        "Makefile",
        "requirements/dev.txt",
    ):
        assert name in names
    for name in ("protos/tokenwire/v1/inference.proto", "native/CMakeLists.txt", "service/tokenwire/_native.pyi"):
        assert name in names
    wrong = [
        name
        for name in names
        if "_pb2" in name
        or (name.endswith((".so", ".o", ".pyc", ".gguf")) and not name.startswith("tests/native/corpus/"))
    ]
    assert wrong == []
    assert not {name.split("/")[0] for name in names} & {"build", "dist", ".venv", ".git"}


def test_the_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("tokenwire") == __version__
    assert _native.build_info()["version"] == __version__


def members(body: list[ast.stmt]) -> set[str]:
    """The public names that a stub file's module or class declares."""
    names = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_the_stub_file_describes_the_compiled_module() -> None:
    stub = ast.parse((ROOT / "service/tokenwire/_native.pyi").read_text(encoding="utf-8"))
    declared = members(stub.body)
    assert {name for name in vars(_native) if not name.startswith("_")} == declared
    for node in stub.body:
        if isinstance(node, ast.ClassDef) and node.name != "EngineError":
            actual = {name for name in vars(getattr(_native, node.name)) if not name.startswith("_")}
            assert actual == members(node.body), node.name
