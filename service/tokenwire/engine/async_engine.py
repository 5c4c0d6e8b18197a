"""The engine on the event loop: live jobs by id, one file descriptor for all wake-ups, drain and failure."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenwire.engine.native import NativeEngine, NativeJob
from tokenwire.engine.residency import watch_residency
from tokenwire.engine.stream import CancelOutcome, CancelResult, ErrorFactory, JobSpec, JobStream
from tokenwire.errors import TokenwireError
from tokenwire.stats import EngineStats

# A job's owner and its id.
JobKey = tuple[str, str]

CANCEL_WAIT_S = 1.0
FLUSH_WAIT_S = 2.0
# A look at the engine that comes this late was held up with all of the process.
FROZEN_S = 1.0
# gRPC takes a call up in about six turns of the loop, one call at a time. So no turn may be long: few of the streams
# that have output go on in a turn, then others come first for some turns. What waits meanwhile goes out as one event.
STREAMS_A_TURN = 4
TURNS_BETWEEN = 16
DRAINING = "the worker is draining"


class AsyncEngine:
    """Owns every `JobStream`. All methods belong to the thread of the loop that `attach` ran on.

    Args:
        native: the engine; `close` stops it.
        remembered_jobs: how many finished job ids stay known to `cancel`.
    """

    def __init__(self, native: NativeEngine, *, remembered_jobs: int = 4096) -> None:
        self._native = native
        self._live: dict[JobKey, JobStream] = {}
        self._by_handle: dict[int, JobStream] = {}
        self._finished: OrderedDict[JobKey, int] = OrderedDict()
        self._remembered_jobs = remembered_jobs
        self._refusal: ErrorFactory | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: deque[int] = deque()

    def attach(self) -> None:
        """Starts listening to the engine on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._native.event_fd, self._collect)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def stats(self) -> EngineStats:
        """A snapshot from memory."""
        return self._native.stats()

    async def watch_residency(self, interval_s: float, report: Callable[[str], None]) -> None:
        """Reports what lies outside the device's memory, now and every `interval_s` seconds, until cancelled."""
        await watch_residency(self._native, interval_s, report)

    def open(self, job_id: str, owner: str = "") -> JobStream:
        """Reserves a job id.

        Args:
            owner: whose the job is; each has ids of its own, and nobody can tell those of another.

        Raises:
            TokenwireError: ALREADY_EXISTS, or UNAVAILABLE once draining.
        """
        if self._refusal is not None:
            raise self._refusal()
        key = (owner, job_id)
        if key in self._live:
            raise TokenwireError("ALREADY_EXISTS")
        stream = JobStream(job_id, self._started, functools.partial(self._ended, key))
        self._live[key] = stream
        self._finished.pop(key, None)
        self._idle.clear()
        return stream

    def start(self, stream: JobStream, spec: JobSpec) -> None:
        """Queues the job of an open stream; see `JobStream.start`."""
        stream.start(self._native, spec)

    async def cancel(self, job_id: str, owner: str = "") -> CancelResult:
        """Stops a job of this owner by id; after it returns no token of that job is sent. Idempotent."""
        key = (owner, job_id)
        stream = self._live.get(key)
        if stream is not None:
            return await stream.cancel(CANCEL_WAIT_S)
        if key in self._finished:
            return CancelResult(CancelOutcome.ALREADY_FINISHED, self._finished[key])
        return CancelResult(CancelOutcome.NOT_FOUND, 0)

    def stop_admitting(self) -> None:
        """From now on `open` raises UNAVAILABLE; live jobs go on."""
        self._refusal = self._refusal or _draining

    def resume_admitting(self) -> None:
        """Undoes `stop_admitting`; an engine that failed stays as it is."""
        if self._refusal is _draining:
            self._refusal = None

    @property
    def batch_window_ms(self) -> int:
        """How long an idle engine waits for company before a first step. Assigning takes effect with the next one."""
        return self._native.batch_window_ms

    @batch_window_ms.setter
    def batch_window_ms(self, milliseconds: int) -> None:
        self._native.batch_window_ms = milliseconds

    async def inspect_cache(self) -> tuple[Mapping[bytes, tuple[int, int]], str]:
        """What the prefix cache holds, as `_native.Engine.cache_contents` says it, and the ledger's audit. Waits for
        the step that runs, in a thread."""
        loop = asyncio.get_running_loop()
        contents = await loop.run_in_executor(None, self._native.cache_contents)
        return contents, await loop.run_in_executor(None, self._native.audit)

    async def clear_cache(self) -> int:
        """Gives up every cached block; returns how many. Waits for the step that runs, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(None, self._native.clear_cache)

    async def drain(self, timeout_s: float, cut_short: asyncio.Event | None = None) -> int:
        """Stops admitting and waits for live jobs; those left end with UNAVAILABLE. Returns how many were left.

        Args:
            timeout_s: how long jobs may finish.
            cut_short: ends the wait early when set.
        """
        self.stop_admitting()
        if await self._wait_idle(timeout_s, cut_short):
            return 0
        left = len(self._live)
        for stream in [stream for stream in self._live.values() if stream.handle is None]:
            stream.fail(_draining)
        # In a thread, and not waited for without a bound: the engine answers between two steps, and one may hang.
        loop = asyncio.get_running_loop()
        failing = loop.run_in_executor(None, self._native.fail_all, "UNAVAILABLE", DRAINING)
        await asyncio.wait([failing], timeout=FLUSH_WAIT_S)
        if not await self._wait_idle(FLUSH_WAIT_S, None):
            self.fail(_draining)
        return left

    def fail(self, error: ErrorFactory) -> None:
        """Ends every stream with an error and admits nothing more, without asking the engine."""
        self._refusal = error
        for stream in list(self._live.values()):
            stream.fail(error)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no stream is open; False if that took longer."""
        return await self._wait_idle(timeout_s, None)

    async def close(self) -> None:
        """Stops the engine; waits in a thread for the step in progress."""
        if self._loop is not None:
            self._loop.remove_reader(self._native.event_fd)
            self._loop = None
        await asyncio.get_running_loop().run_in_executor(None, self._native.stop)

    async def _wait_idle(self, timeout_s: float, cut_short: asyncio.Event | None) -> bool:
        waits = [asyncio.ensure_future(self._idle.wait())]
        if cut_short is not None:
            waits.append(asyncio.ensure_future(cut_short.wait()))
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        return self._idle.is_set()

    def _collect(self) -> None:
        idle = not self._ready
        self._ready.extend(self._native.take_ready())
        if idle:
            self._deliver()

    def _deliver(self) -> None:
        for _ in range(min(len(self._ready), STREAMS_A_TURN)):
            stream = self._by_handle.get(self._ready.popleft())
            if stream is not None:
                stream.notify()
        if self._ready:
            self._give_way(TURNS_BETWEEN)

    def _give_way(self, turns: int) -> None:
        if self._loop is None:
            return
        if turns:
            self._loop.call_soon(self._give_way, turns - 1)
        else:
            self._deliver()

    def _started(self, stream: JobStream, job: NativeJob) -> None:
        self._by_handle[job.handle] = stream

    def _ended(self, key: JobKey, stream: JobStream) -> None:
        self._live.pop(key, None)
        if stream.handle is not None:
            self._by_handle.pop(stream.handle, None)
        if stream.known:
            self._finished[key] = stream.tokens_out
            while len(self._finished) > self._remembered_jobs:
                self._finished.popitem(last=False)
        if not self._live:
            self._idle.set()


def _draining() -> TokenwireError:
    return TokenwireError("UNAVAILABLE", DRAINING, phase="draining")


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """Why an engine is dead; `code` is one of errors.py's, or empty if it did not live to say."""

    code: str
    reason: str


async def watch_engine(
    engine: AsyncEngine,
    *,
    watchdog_s: float,
    interval_s: float = 0.25,
    on_look: Callable[[], None] = lambda: None,
) -> EngineFailure:
    """Returns why the engine is dead, once it is: its thread ended, or a step shows no life for `watchdog_s`.

    Time in which the whole process stood still (SIGSTOP, a frozen container) counts for nobody's silence.

    Args:
        on_look: called every `interval_s`.
    """
    looked_at = time.monotonic()
    thawed_at = -math.inf
    while True:
        on_look()
        stats = engine.stats()
        now = time.monotonic()
        if now - looked_at > interval_s + FROZEN_S:
            thawed_at = now
        looked_at = now
        if stats.failure:
            return EngineFailure(stats.failure_code, stats.failure)
        silent_s = min(stats.heartbeat_age_ms / 1000, now - thawed_at)
        if silent_s > watchdog_s:
            return EngineFailure("", f"no sign of life for {silent_s:.1f} s")
        await asyncio.sleep(interval_s)
