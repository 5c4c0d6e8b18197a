"""Jobs that outlive their calls: who may attach, how long they are kept, and how much memory they may take together."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from tokenwire.engine import JobStream
from tokenwire.engine.stream import END_TAG, METRICS_TAG, STARTED_TAG, TOKEN_TAG
from tokenwire.errors import TokenwireError
from tokenwire.observe.logging import get_logger
from tokenwire.observe.metrics import DISCONNECTED, OK
from tokenwire.rpc import convert
from tokenwire.rpc.replay import EVENT_BYTES, Replay

# Calls that may read one job at the same time. A connection that died in silence counts until keepalive finds it.
MAX_READERS = 8
CANCEL_WAIT_S = 1.0

LogEnd = Callable[[JobStream, str, float], None]


@dataclass(frozen=True, slots=True)
class DetachLimits:
    """Bounds of what is kept.

    Attributes:
        grace_s: how long a job is kept with nobody reading it, while it runs and after it ended.
        job_bytes: most that is kept of one job; the oldest events go first.
        total_bytes: most that is kept of all; finished jobs that nobody reads go first.
        slow_reader_s: how long a reader may hold up a job whose buffer is full.
    """

    grace_s: float
    job_bytes: int
    total_bytes: int
    slow_reader_s: float


class DetachedJob:
    """A job with its record, and the task that moves events from one to the other."""

    def __init__(self, job_id: str, token: str, owner: str, num_prompt_tokens: int) -> None:
        self.job_id = job_id
        self.token = token
        self.key = _key(job_id, token)
        self.owner = owner
        self.replay = Replay(num_prompt_tokens)
        self.counted_bytes = 0
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None


class DetachedJobs:
    """Every detached job that can still be attached to. Belongs to the event loop's thread.

    A job is found by its id together with its secret, so that nobody can displace another's record by using its id.
    """

    def __init__(self, limits: DetachLimits) -> None:
        self._limits = limits
        self._jobs: dict[bytes, DetachedJob] = {}
        self._newest: dict[tuple[str, str], DetachedJob] = {}
        self._num_bytes = 0

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @property
    def num_bytes(self) -> int:
        """Memory that all records take."""
        return self._num_bytes

    def keep(
        self,
        stream: JobStream,
        resources: contextlib.ExitStack,
        *,
        token: str,
        owner: str,
        num_prompt_tokens: int,
        arrived: float,
        log_end: LogEnd,
    ) -> Replay:
        """Takes over a job that was started; from here on it lives by itself.

        Args:
            resources: what to close when the job ends; holds `stream`.
            arrived: when the request came (`time.monotonic`, seconds).
            log_end: called with the stream, how it ended, and the seconds since it arrived.
        """
        job = DetachedJob(stream.job_id, token, owner, num_prompt_tokens)
        previous = self._jobs.get(job.key)
        if previous is not None:
            self._remove(previous)
        self._jobs[job.key] = job
        self._newest[job.owner, job.job_id] = job
        self._count(job)
        job.task = asyncio.get_running_loop().create_task(self._run(job, stream, resources, arrived, log_end))
        self._schedule(job)
        return job.replay

    def attach(self, job_id: str, token: str, owner: str, from_index: int) -> AsyncGenerator[bytes, None]:
        """The events of a job from a token on; see `Replay.read`.

        Raises:
            TokenwireError: NOT_FOUND, INVALID_REQUEST, or OVERLOADED for too many readers.
        """
        job = self._jobs.get(_key(job_id, token))
        if job is None or not hmac.compare_digest(job.owner.encode(), owner.encode()):
            # One sentence for every cause: it must not tell whether somebody else's job exists.
            raise TokenwireError("NOT_FOUND", "there is no detached job of this id and attach token")
        if job.replay.num_readers >= MAX_READERS:
            raise TokenwireError("OVERLOADED", f"{MAX_READERS} calls read this job already")
        job.replay.check(from_index)
        return job.replay.read(from_index)

    async def cancel(self, job_id: str, owner: str) -> None:
        """Stops tokens of this owner's job to every reader, before its engine is told. On return none is sent."""
        job = self._newest.get((owner, job_id))
        if job is not None:
            await job.replay.cancel(CANCEL_WAIT_S)
            self._count(job)

    async def _run(
        self, job: DetachedJob, stream: JobStream, resources: contextlib.ExitStack, arrived: float, log_end: LogEnd
    ) -> None:
        replay, end, ending = job.replay, None, DISCONNECTED
        with resources:
            try:
                async for message in stream:
                    tag = message[0]
                    if tag == TOKEN_TAG:
                        await self._make_room(job, len(message) + EVENT_BYTES)
                        replay.add(message)
                        self._count(job)
                    elif tag == STARTED_TAG:
                        replay.set_started(convert.with_attach_token(message, job.token))
                    elif tag == METRICS_TAG:
                        replay.set_metrics(message)
                    elif tag == END_TAG:
                        end = message
                failure = stream.failure
                ending = failure.code if failure is not None else OK
            except Exception:  # noqa: BLE001 - whatever it is, those who read must hear of it
                get_logger().error("error", code="INTERNAL", exc_info=True)
                ending, failure = "INTERNAL", TokenwireError("INTERNAL")
            finally:
                log_end(stream, ending, time.monotonic() - arrived)
        code, message_text = (failure.code, failure.message) if failure is not None else ("", "")
        replay.finish(end, (lambda: TokenwireError(code, message_text)) if code else None)

    async def _make_room(self, job: DetachedJob, num_bytes: int) -> None:
        """Makes `num_bytes` more fit the bounds of the job and of all, as far as that is possible."""
        replay = job.replay
        while True:
            while self._total_is_over(num_bytes) and self._evict():
                pass
            if replay.num_bytes + num_bytes <= self._limits.job_bytes and not self._total_is_over(num_bytes):
                return
            if replay.drop_oldest():
                self._count(job)
            elif replay.is_held_up:
                await replay.wait_for_readers(self._limits.slow_reader_s)
            else:
                return

    def _total_is_over(self, num_bytes: int) -> bool:
        return self._num_bytes + num_bytes > self._limits.total_bytes

    def _evict(self) -> bool:
        """Forgets the finished job that was left alone longest; False if there is none."""
        idle = [job for job in self._jobs.values() if job.replay.done and not job.replay.num_readers]
        if not idle:
            return False
        self._remove(min(idle, key=lambda job: job.replay.used_at))
        return True

    def _schedule(self, job: DetachedJob) -> None:
        loop, replay = asyncio.get_running_loop(), job.replay
        # Somebody who reads keeps a job that runs, but not one that ended: then every reader can hurry.
        idle_since = loop.time() if replay.num_readers and not replay.done else replay.used_at
        due = idle_since + self._limits.grace_s
        if due > loop.time():
            job.timer = loop.call_at(due, self._schedule, job)
            return
        get_logger().info("detached_expired", job_id=job.job_id, finished=replay.done)
        self._remove(job)

    def _remove(self, job: DetachedJob) -> None:
        if self._jobs.get(job.key) is not job:
            return
        del self._jobs[job.key]
        if self._newest.get((job.owner, job.job_id)) is job:
            del self._newest[job.owner, job.job_id]
        self._num_bytes -= job.counted_bytes
        job.counted_bytes = 0
        if job.timer is not None:
            job.timer.cancel()
        job.replay.fail_readers()
        if job.task is not None:
            job.task.cancel()  # which stops a job that still runs

    def _count(self, job: DetachedJob) -> None:
        if self._jobs.get(job.key) is job:
            self._num_bytes += job.replay.num_bytes - job.counted_bytes
            job.counted_bytes = job.replay.num_bytes


def _key(job_id: str, token: str) -> bytes:
    return hashlib.sha256(f"{job_id}\0{token}".encode()).digest()
