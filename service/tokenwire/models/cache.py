"""The directory where pulled models rest: private to the user, one puller at a time, and only verified files in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from tokenwire.models.errors import ModelSourceError

_CHUNK = 1 << 20


def cache_dir() -> Path:
    """`$TOKENWIRE_CACHE`, else the platform's cache directory for the user. Not created by this call."""
    configured = os.environ.get("TOKENWIRE_CACHE")
    return Path(configured).expanduser().absolute() if configured else Path(platformdirs.user_cache_dir("tokenwire"))


def make_private_dir(path: Path) -> Path:
    """Creates a directory of mode 0700 below the cache, and the cache with it.

    Raises:
        ModelSourceError: it cannot be created.
    """
    try:
        for directory in (cache_dir(), path):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ModelSourceError("MODEL_CACHE_UNWRITABLE", f"cannot create {path}: {error.strerror}") from error
    return path


@contextmanager
def pull_lock(directory: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a directory against other pulls, in this process or another; `on_wait` is called if one is under way."""
    make_private_dir(directory)
    with (directory / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_verified(path: Path, sha256: str | None, size: int | None = None) -> bool:
    """Whether a pulled file is complete and has this digest.

    A stamp beside the file remembers the digest of its present size and time of change, so that starting a server
    does not read a large file twice. Without a valid stamp the file is read.

    Raises:
        ModelSourceError: MODEL_CHECKSUM_MISMATCH, if it was read and differs.
    """
    try:
        status = path.stat()
    except OSError:
        return False
    if size is not None and status.st_size != size:
        raise ModelSourceError(
            "MODEL_CHECKSUM_MISMATCH",
            f"{path} has {status.st_size} bytes, expected {size}; delete it and pull the model again",
        )
    stamp = _read_stamp(path)
    fresh = stamp.get("size") == status.st_size and stamp.get("mtime_ns") == status.st_mtime_ns
    actual = stamp.get("sha256") if fresh else sha256_of(path)
    if sha256 is not None and actual != sha256:
        raise ModelSourceError(
            "MODEL_CHECKSUM_MISMATCH",
            f"{path} has SHA-256 {actual}, expected {sha256}; delete it and pull the model again",
        )
    if not fresh:
        write_stamp(path, str(actual))
    return True


def write_stamp(path: Path, sha256: str) -> None:
    """Remembers a file's digest. A cache that cannot be written only costs time."""
    status = path.stat()
    stamp = {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    temporary = _stamp_path(path).with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(stamp), "utf-8")
        temporary.replace(_stamp_path(path))
    except OSError:
        return


def install(temporary: Path, destination: Path, sha256: str) -> None:
    """Moves a complete file to its place: at every moment the place holds nothing or a whole file."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(destination)
    directory = os.open(destination.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    write_stamp(destination, sha256)


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _read_stamp(path: Path) -> dict[str, object]:
    try:
        stamp = json.loads(_stamp_path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}
