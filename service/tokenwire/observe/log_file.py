"""The log file: written by a thread of its own, rotated daily or by size, compressed, kept for some days.

A disk that stalls or is full holds nobody up: lines wait in a bounded queue, and those that find no room are counted.
"""

from __future__ import annotations

import gzip
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tokenwire.config import Settings

QUEUE_LINES = 10_000
CLOSE_TIMEOUT_S = 5.0
SECONDS_A_DAY = 86_400
MB = 10**6

# A file that could not be rotated is appended to for so long.
RETRY_ROTATION_S = 60.0

_STOP = object()
_WAKE = object()


class LogFile(logging.Handler):
    """Appends lines to a file.

    It is rotated when the (UTC) day ends or before it would outgrow `max_bytes`: `worker.log` becomes
    `worker.log.20260131T235959Z.gz`. What is older than `keep_days` is deleted.

    Args:
        clock: seconds since the epoch.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, max_bytes: int, keep_days: int, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._path = path
        self._max_bytes = max_bytes
        self._keep_s = keep_days * SECONDS_A_DAY
        self._clock = clock
        self._queue: queue.Queue[object] = queue.Queue(QUEUE_LINES)
        self._num_dropped = 0
        self._num_told = 0
        self._fd = -1
        self._rotate_from = 0.0
        self._reopen_asked = threading.Event()
        self._compressing: list[threading.Thread] = []
        self._open()
        self._thread = threading.Thread(target=self._run, name="log-file", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Lines lost since the start."""
        return self._num_dropped

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._queue.put_nowait((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except queue.Full:
            self._num_dropped += 1
        except Exception:  # noqa: BLE001 - a line that cannot be made must not end what it tells of
            self.handleError(record)

    def reopen(self) -> None:
        """Opens the path anew, for tools that move the file away themselves. Never waits."""
        self._reopen_asked.set()
        try:
            self._queue.put_nowait(_WAKE)
        except queue.Full:
            pass  # then lines will wake it

    def flush(self) -> None:
        """Waits until everything logged so far is written or lost, or for `CLOSE_TIMEOUT_S`."""
        with self._queue.all_tasks_done:
            self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, CLOSE_TIMEOUT_S)

    def close(self) -> None:
        if self._thread.is_alive():
            try:
                self._queue.put(_STOP, timeout=CLOSE_TIMEOUT_S)
                self._thread.join(CLOSE_TIMEOUT_S)
            except queue.Full:
                pass  # the disk takes nothing, and the process ends
        for thread in self._compressing:
            thread.join(CLOSE_TIMEOUT_S)
        super().close()

    # --- The writer's thread. ---

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is _STOP:
                    return
                self._write(item if isinstance(item, bytes) else b"")
            finally:
                self._queue.task_done()

    def _write(self, line: bytes) -> None:
        try:
            if self._reopen_asked.is_set():
                self._reopen_asked.clear()
                self._close_fd()
            if self._fd < 0:
                self._open()
            if line and self._is_due(len(line)):
                self._rotate()
            self._append(line)
        except OSError:
            self._num_dropped += 1 if line else 0
            self._close_fd()
            return
        if self._num_told < self._num_dropped:
            lost, self._num_told = self._num_dropped - self._num_told, self._num_dropped
            logging.getLogger("tokenwire").warning("log_lines_dropped: %d", lost)

    def _append(self, line: bytes) -> None:
        """Writes a line whole or not at all."""
        written = os.write(self._fd, line)
        if written < len(line):
            os.ftruncate(self._fd, self._size)
            raise OSError("the disk is full")
        self._size += written

    def _is_due(self, num_bytes: int) -> bool:
        if self._size == 0 or self._clock() < self._rotate_from:
            return False
        return self._size + num_bytes > self._max_bytes or self._day(self._clock()) != self._opened_day

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        status = os.fstat(self._fd)
        self._size = status.st_size
        # A file that an earlier process left keeps its own day.
        self._opened_day = self._day(status.st_mtime if self._size else self._clock())

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _rotate(self) -> None:
        self._close_fd()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock()))
        full = self._path.with_name(f"{self._path.name}.{stamp}")
        number = 1
        while full.exists() or full.with_name(full.name + ".gz").exists():
            number += 1
            full = self._path.with_name(f"{self._path.name}.{stamp}-{number}")
        try:
            self._path.rename(full)
        except OSError:
            self._rotate_from = self._clock() + RETRY_ROTATION_S
            self._open()
            return
        self._open()
        self._compressing = [thread for thread in self._compressing if thread.is_alive()]
        self._compressing.append(threading.Thread(target=self._store, args=(full,), name="log-compress", daemon=True))
        self._compressing[-1].start()

    def _store(self, full: Path) -> None:
        """Compresses a full file and deletes what is too old."""
        packed = full.with_name(full.name + ".gz")
        unfinished = full.with_name(full.name + ".gz.tmp")
        try:
            with full.open("rb") as source, gzip.open(unfinished, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)
            unfinished.rename(packed)
            full.unlink()
        except OSError:
            unfinished.unlink(missing_ok=True)  # it stays as it is, and is deleted in its time
        for old in self._path.parent.glob(f"{self._path.name}.[0-9]*"):
            try:
                if old.stat().st_mtime < self._clock() - self._keep_s:
                    old.unlink()
            except OSError:
                continue  # somebody else was faster

    @staticmethod
    def _day(seconds: float) -> int:
        return int(seconds // SECONDS_A_DAY)


def open_log_file(settings: Settings) -> LogFile:
    """
    Raises:
        OSError: the file cannot be opened.
    """
    return LogFile(Path(settings.log_file), max_bytes=settings.log_max_mb * MB, keep_days=settings.log_keep_days)


def open_log_files() -> list[LogFile]:
    """Those that the root logger writes to."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, LogFile)]


def reopen_log_files() -> None:
    for file in open_log_files():
        file.reopen()


def flush_log_files() -> None:
    for file in open_log_files():
        file.flush()


def num_lines_dropped() -> int:
    return sum(file.num_dropped for file in open_log_files())
