"""A resumable download over HTTP: what arrived stays in the `.part` file, and the next attempt asks for the rest."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenwire.models.errors import ModelSourceError

Progress = Callable[[int, int | None], None]
"""Called with the bytes present so far and the total, if known."""

_CHUNK = 1 << 18
_TIMEOUT_S = 60
_MAX_FRUITLESS_ATTEMPTS = 4
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(slots=True)
class _Part:
    """The `.part` file and what identifies the remote file that it is a part of."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def origin(self, url: str) -> tuple[str | None, int | None]:
        """The ETag or date that the part came with and the whole file's size, if it is a part of this URL."""
        try:
            note = json.loads(self._note.read_bytes())
        except (OSError, ValueError):
            return None, None
        if not isinstance(note, dict) or note.get("url") != url:
            return None, None
        return note.get("validator"), note.get("total")

    def begin(self, url: str, validator: str | None, total: int | None) -> None:
        self._note.write_text(json.dumps({"url": url, "validator": validator, "total": total}), "utf-8")
        self.path.write_bytes(b"")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    @property
    def _note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")


class DownloadRefused(ModelSourceError):
    """The server or the connection's security refused: trying again, or resuming, does not help."""


def download(url: str, part_path: Path, progress: Progress | None = None, retry_delay_s: float = 1.0) -> Path:
    """Fetches `url` into `part_path` and returns it once it is complete.

    A connection that breaks is resumed; after several attempts without one new byte the error is raised and the part
    stays for the next call. The caller verifies the content, and calls `discard` if it is wrong.

    Raises:
        DownloadRefused: an HTTP status of 400 or more, or a certificate that cannot be verified.
        ModelSourceError: MODEL_DOWNLOAD_FAILED, if the connection keeps breaking or the disk is full.
    """
    part = _Part(part_path)
    if urllib.parse.urlsplit(url).scheme == "file":
        return _copy_local(url, part, progress)
    fruitless = 0
    while True:
        before = part.size
        try:
            if _attempt(url, part, progress):
                return part_path
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                message = f"{_place(url)} answered {error.code}"
                raise DownloadRefused("MODEL_DOWNLOAD_REFUSED", message) from error
            problem = f"{_place(url)} answered {error.code}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                message = f"the certificate of {_place(url)} cannot be verified"
                raise DownloadRefused("MODEL_DOWNLOAD_REFUSED", message) from error
            problem = f"{_place(url)}: {reason or type(error).__name__}"
        except OSError as error:
            raise ModelSourceError("MODEL_DOWNLOAD_FAILED", f"cannot write {part_path}: {error.strerror}") from error
        fruitless = fruitless + 1 if part.size <= before else 0
        if fruitless >= _MAX_FRUITLESS_ATTEMPTS:
            message = f"the download failed ({problem}); run the same command again to resume it"
            raise ModelSourceError("MODEL_DOWNLOAD_FAILED", message)
        time.sleep(retry_delay_s * fruitless)


def discard(part_path: Path) -> None:
    """Forgets a part whose content proved wrong."""
    _Part(part_path).discard()


def _attempt(url: str, part: _Part, progress: Progress | None) -> bool:
    """One request; whether the file is complete after it."""
    headers = {"Accept-Encoding": "identity"}
    have = part.size
    validator, total = part.origin(url)
    if total is not None and have == total:
        return True
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        response = open_url(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        # The part is not a prefix of what the server has now.
        part.discard()
        return False
    with response:
        total = _begin_or_continue(url, response, part, have)
        with part.path.open("ab") as file:
            while chunk := response.read1(_CHUNK):
                file.write(chunk)
                if progress is not None:
                    progress(file.tell(), total)
            file.flush()
            os.fsync(file.fileno())
    # A server that states no length ends the body by closing; the checksum is then what tells.
    return total is None or part.size == total


def _begin_or_continue(url: str, response: http.client.HTTPResponse, part: _Part, have: int) -> int | None:
    """Readies the part for the body of this response; returns the whole file's size, if stated."""
    if response.status == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != have:
            part.discard()
            raise http.client.HTTPException("the server sent another range than asked for")
        return None if match[2] == "*" else int(match[2])
    # A weak ETag promises equal meaning, not equal bytes, so a range cannot rest on it.
    etag = response.headers.get("ETag")
    strong = etag if etag and not etag.startswith("W/") else None
    length = response.headers.get("Content-Length")
    total = int(length) if length is not None and length.isdigit() else None
    part.begin(url, strong or response.headers.get("Last-Modified"), total)
    return total


def open_url(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """A GET over HTTP or HTTPS, with the environment's proxies and its certificate bundle if one is set.

    Raises:
        urllib.error.URLError: as urllib does; HTTPError for a status of 400 or more.
    """
    names = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
    bundle = next((os.environ[name] for name in names if os.environ.get(name)), None)
    context = ssl.create_default_context(cafile=bundle if bundle and Path(bundle).is_file() else None)
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=context),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": "tokenwire", **headers})  # noqa: S310  (no file:)
    response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT_S)
    return response


def _copy_local(url: str, part: _Part, progress: Progress | None) -> Path:
    source = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    try:
        part.discard()
        shutil.copyfile(source, part.path)
    except OSError as error:
        raise ModelSourceError("MODEL_DOWNLOAD_FAILED", f"cannot copy {source}: {error.strerror}") from error
    if progress is not None:
        progress(part.size, part.size)
    return part.path


def _place(url: str) -> str:
    """Host of a URL, without the credentials that it may carry."""
    return urllib.parse.urlsplit(url).hostname or "the server"
