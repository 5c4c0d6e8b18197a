"""The file of keys: read with every problem named, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from tokenwire.security.keys import MAX_KEYS, CertificateRecord, KeyRecord, KeyRing

VERSION = 1
MAX_FILE_BYTES = 8 * 2**20
MAX_PROBLEMS = 16

Record = TypeVar("Record", KeyRecord, CertificateRecord)


class KeyFileError(Exception):
    """The file of keys is not usable. `problems` has a line for each thing that is wrong; none holds a hash."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self.path = path
        more = len(problems) - MAX_PROBLEMS
        self.problems = tuple(problems[:MAX_PROBLEMS]) + ((f"{more} more problems",) if more > 0 else ())
        super().__init__(f"{path}: {'; '.join(self.problems)}")


def read_keys(path: Path) -> KeyRing:
    """
    Raises:
        KeyFileError: the file cannot be read, can be written by everyone, or is not what it should be.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise KeyFileError(path, ["is not a file"])
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(path, [f"cannot be read: {error.strerror}"]) from error
    if mode & stat.S_IWOTH:
        raise KeyFileError(path, ["every user may write it, and so make a key: chmod o-w"])
    if len(data) > MAX_FILE_BYTES:
        raise KeyFileError(path, [f"is larger than {MAX_FILE_BYTES} bytes"])
    return _parse(path, data)


def write_keys(path: Path, ring: KeyRing) -> None:
    """Replaces the file in one step; a new one is readable by its owner only.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    content = {
        "version": VERSION,
        "keys": [record.model_dump(mode="json", exclude_none=True) for record in ring.keys.values()],
        "certificates": [record.model_dump(mode="json", exclude_none=True) for record in ring.certificates.values()],
    }
    path = path.resolve()
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds off other writers of the file, so that two commands at once do not lose a key."""
    # The file itself is replaced by every write, so the lock lives beside it.
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open_without_waiting(path: str, flags: int) -> int:
    # A pipe without a writer would hold the process up for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _parse(path: Path, data: bytes) -> KeyRing:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise KeyFileError(path, ["is not valid JSON"]) from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise KeyFileError(path, [f"is not a file of keys of version {VERSION}"])
    problems = [f"{name}: no such field" for name in content.keys() - {"version", "keys", "certificates"}]
    keys = _records(KeyRecord, "keys", content.get("keys", []), problems)
    certificates = _records(CertificateRecord, "certificates", content.get("certificates", []), problems)
    ring = KeyRing(keys, certificates)
    if len(ring.keys) != len(keys):
        problems.append("keys: an id occurs more than once")
    if len(ring.certificates) != len(certificates):
        problems.append("certificates: an identity occurs more than once")
    if problems:
        raise KeyFileError(path, problems)
    return ring


def _records(kind: type[Record], name: str, entries: object, problems: list[str]) -> list[Record]:
    if not isinstance(entries, list):
        problems.append(f"{name}: must be a list")
        return []
    if len(entries) > MAX_KEYS:
        problems.append(f"{name}: more than {MAX_KEYS}")
        return []
    records = []
    for place, entry in enumerate(entries):
        try:
            records.append(kind.model_validate(entry))
        except ValidationError as error:
            for item in error.errors(include_url=False, include_context=False, include_input=False):
                where = ".".join(str(part) for part in item["loc"])
                problems.append(f"{name}[{place}].{where}: {item['msg']}")
    return records
