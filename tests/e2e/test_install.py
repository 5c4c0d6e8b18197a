"""The wheel as a user gets it: installed into an environment of its own, away from the sources, it serves a model."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from e2e.helpers import only_when_asked, say
from e2e.helpers_server import wait_until_ready
from tokenwire import __version__, models

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S = 1800
MOST_BYTES = {"cpu": 5_000_000, "cuda": 20_000_000}

pytestmark = pytest.mark.timeout(BUILD_TIMEOUT_S)


def run(*command: str | Path, timeout_s: float = BUILD_TIMEOUT_S, **options: object) -> str:
    result = subprocess.run(  # type: ignore[call-overload]
        command, capture_output=True, text=True, timeout=timeout_s, check=False, **options
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return str(result.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the tools that are installed; reuses what `make setup` compiled."""
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", directory, ROOT)
    (built,) = directory.iterdir()
    return built


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """The `bin` of an environment that holds nothing of ours yet."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    return place / "bin"


def serve_and_generate(bin_directory: Path, elsewhere: Path) -> None:
    """Runs the installed commands in a directory that is not the sources'."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TOKENWIRE_"))}
    tokenwire = bin_directory / "tokenwire"
    where = run(bin_directory / "python", "-c", "import tokenwire; print(tokenwire.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(bin_directory.parent)
    version = run(tokenwire, "--version", cwd=elsewhere, env=environment)
    assert re.fullmatch(rf"tokenwire {re.escape(__version__)} \(commit \S+, .+, CUDA: .+\)\n", version), version
    assert run(bin_directory / "python", "-m", "tokenwire", "--version", cwd=elsewhere, env=environment) == version

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
    model = str(models.resolve("smollm2", fetch=True))
    command = [str(tokenwire), "serve", "--model", model, "--port", target.split(":")[1]]
    with (elsewhere / "worker.log").open("wb") as log:
        worker = subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(worker, target)
        flags = ("--target", target, "--raw", "--max-tokens", "2", "--temperature", "0")
        answer = run(tokenwire, "generate", "The capital of France is", *flags, cwd=elsewhere, env=environment)
        assert answer.strip() == "Paris."
        worker.terminate()
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        worker.wait()


def test_the_wheel_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        kind = "cuda" if any("tokenwire_cuda" in name for name in archive.namelist()) else "cpu"
    say(f"the wheel, {kind}: {wheel.stat().st_size:,} bytes")
    assert wheel.stat().st_size <= MOST_BYTES[kind]


def test_an_installed_wheel_serves_a_model(wheel: Path, clean: Path, tmp_path: Path) -> None:
    """The requirements are those of this environment, to save fetching them; `slow` has the whole of it."""
    run(clean / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(run(clean / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    serve_and_generate(clean, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pip_install_of_the_sources_serves_a_model(request: pytest.FixtureRequest, clean: Path, tmp_path: Path) -> None:
    """`pip install .` as documented: build isolation, requirements from the index, everything compiled."""
    only_when_asked(request)
    sources = tmp_path / "sources"
    sources.mkdir()
    archive = subprocess.run(["git", "-C", ROOT, "archive", "HEAD"], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", sources], input=archive, check=True)
    run(clean / "pip", "install", "--quiet", sources, timeout_s=BUILD_TIMEOUT_S)
    run(clean / "pip", "check")
    shutil.rmtree(sources)
    serve_and_generate(clean, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_builds_are_the_same_bytes(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """From two directories, at two times, with nothing shared."""
    only_when_asked(request)
    archive = subprocess.run(["git", "-C", ROOT, "archive", "HEAD"], capture_output=True, check=True).stdout
    digests = []
    for name in ("one", "another-place"):
        sources = tmp_path / name
        sources.mkdir()
        subprocess.run(["tar", "-x", "-C", sources], input=archive, check=True)
        environment = {
            **os.environ,
            "SOURCE_DATE_EPOCH": "1735689600",
            "TOKENWIRE_COMMIT": "test",
            "CCACHE_DISABLE": "1",
        }
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", sources, env=environment)
        (built,) = (sources / "dist").iterdir()
        digests.append(hashlib.sha256(built.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("lock", ["runtime", "build"])
def test_the_locks_of_the_image_fit_the_package(lock: str) -> None:
    """A requirement added to pyproject.toml is in the lock too, in a version that it allows (`make lock`)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["build-system"]["requires"] if lock == "build" else list(project["project"]["dependencies"])
    if lock == "runtime":
        wanted += project["project"]["optional-dependencies"].get("otel", [])
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    locked = {
        name.lower(): version for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE)
    }
    for requirement in map(Requirement, wanted):
        version = locked.get(requirement.name.lower())
        assert version is not None, f"{requirement.name} is not in {lock}.txt: make lock"
        assert requirement.specifier.contains(version), f"{requirement} is {version} in {lock}.txt"
    assert "--hash=sha256:" in text
