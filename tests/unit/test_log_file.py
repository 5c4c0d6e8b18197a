"""The log file: rotated, compressed, pruned, reopened, and never in anybody's way (A-3)."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenwire.observe import log_file as module
from tokenwire.observe.log_file import SECONDS_A_DAY, LogFile, num_lines_dropped
from tokenwire.observe.logging import configure_logging, get_logger

NOON = 1_700_000_000.0 // SECONDS_A_DAY * SECONDS_A_DAY + SECONDS_A_DAY / 2


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for file in module.open_log_files():
        file.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def log_to(
    path: Path, *, max_bytes: int = 10**6, keep_days: int = 7, clock: Callable[[], float] | None = None
) -> LogFile:
    file = LogFile(path, max_bytes=max_bytes, keep_days=keep_days, clock=clock or Clock())
    configure_logging("info", "json", log_file=file)
    return file


def events(path: Path) -> list[str]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line)["event"] for line in data.splitlines()]


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_text('{"event": "earlier"}\n')
    os.utime(path, (NOON, NOON))
    file = log_to(path)
    get_logger().info("now")
    file.close()
    assert events(path) == ["earlier", "now"]


def test_errors_go_to_stderr_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = log_to(tmp_path / "worker.log")
    get_logger().info("quiet")
    get_logger().error("loud")
    file.flush()
    assert (tmp_path / "worker.log").stat().st_mode & 0o007 == 0
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["loud"]
    assert events(tmp_path / "worker.log") == ["quiet", "loud"]


def test_it_is_rotated_by_size_compressed_and_no_line_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    file = log_to(path, max_bytes=2000)
    for number in range(100):
        get_logger().info(f"event-{number}")
    file.close()
    rotated = sorted(tmp_path.glob("worker.log.*"), key=lambda full: (len(full.name), full.name))
    assert len(rotated) > 3
    assert all(full.suffix == ".gz" for full in rotated)
    assert path.stat().st_size <= 2000
    assert [event for full in (*rotated, path) for event in events(full)] == [f"event-{n}" for n in range(100)]


def test_it_is_rotated_when_the_day_ends(tmp_path: Path) -> None:
    clock = Clock()
    file = log_to(tmp_path / "worker.log", clock=clock)
    get_logger().info("today")
    file.flush()
    clock.now += SECONDS_A_DAY
    get_logger().info("tomorrow")
    file.close()
    assert events(tmp_path / "worker.log") == ["tomorrow"]
    (rotated,) = tmp_path.glob("worker.log.*.gz")
    assert events(rotated) == ["today"]


def test_what_is_too_old_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    clock = Clock()
    old, recent, foreign = (
        tmp_path / f"worker.log.{end}" for end in ("20200101T000000Z.gz", "20230101T000000Z.gz", "txt")
    )
    for path, age_days in ((old, 8), (recent, 6), (foreign, 100)):
        path.write_bytes(b"")
        os.utime(path, (NOON - age_days * SECONDS_A_DAY,) * 2)
    file = log_to(tmp_path / "worker.log", max_bytes=1, clock=clock)
    get_logger().info("one")
    get_logger().info("two")
    file.close()
    assert not old.exists()
    assert recent.exists()
    assert foreign.exists()


def test_a_file_moved_away_is_made_anew_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    file = log_to(path)
    get_logger().info("before")
    file.flush()
    path.rename(tmp_path / "moved")
    file.reopen()
    file.flush()
    assert path.exists(), "at once, and not with the next line"
    get_logger().info("after")
    file.close()
    assert (events(tmp_path / "moved"), events(path)) == (["before"], ["after"])


def test_a_full_disk_drops_whole_lines_counts_them_and_says_so_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "worker.log"
    file = log_to(path, clock=time.time)
    get_logger().info("fits")
    file.flush()
    real_write = os.write

    def full(fd: int, data: bytes) -> int:
        if threading_name() == "log-file":
            return real_write(fd, data[:5])
        return real_write(fd, data)

    def no_space(fd: int, data: bytes) -> int:
        if threading_name() == "log-file":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(fd, data)

    for broken in (full, no_space):
        monkeypatch.setattr(os, "write", broken)
        get_logger().info("lost")
        file.flush()
    monkeypatch.setattr(os, "write", real_write)
    assert num_lines_dropped() == file.num_dropped == 2
    get_logger().info("fits again")
    file.flush()
    file.close()
    assert events(path) == ["fits", "fits again", "log_lines_dropped: 2"]


def test_a_disk_that_stalls_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    release = threading.Event()
    real_write = os.write

    def stalled(fd: int, data: bytes) -> int:
        if threading_name() == "log-file":
            assert release.wait(20)
        return real_write(fd, data)

    monkeypatch.setattr(module, "QUEUE_LINES", 10)
    file = log_to(tmp_path / "worker.log")
    monkeypatch.setattr(os, "write", stalled)
    for _ in range(30):
        get_logger().info("line")
    # The line that later tells of the loss may be lost too, and is not one of these.
    num_dropped = file.num_dropped
    assert num_dropped >= 19
    release.set()
    file.close()
    assert len([event for event in events(tmp_path / "worker.log") if event == "line"]) == 30 - num_dropped


def test_a_directory_that_cannot_be_renamed_in_keeps_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    file = log_to(tmp_path / "worker.log", max_bytes=1)
    for number in range(5):
        get_logger().info(f"event-{number}")
    file.close()
    assert events(tmp_path / "worker.log") == [f"event-{number}" for number in range(5)]


def test_a_path_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        LogFile(tmp_path / "no" / "such" / "folder", max_bytes=1, keep_days=1)


def threading_name() -> str:

    return threading.current_thread().name
