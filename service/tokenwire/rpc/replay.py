"""The events of one detached job, kept so that its stream can be taken up again from any token.

One task (`rpc/detached.py`) adds what the engine produces; any number of readers follow, each at its own pace. The job
is held up by no reader, unless the buffer is full of events that one has yet to take.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field

from tokenwire.errors import FieldViolation, TokenwireError, invalid_request
from tokenwire.rpc import convert
from tokenwire.waiting import wait_until

# What a record costs beside its events, and an event beside its message, bytes: very many small ones are bounded too.
RECORD_BYTES = 2048
EVENT_BYTES = 192
# Events that wait for a reader travel together, up to this much.
MAX_MERGED_TOKENS = 256
MAX_MERGED_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _TokenEvent:
    """A serialised `token` event and the tokens it holds: indices `first` to `end - 1`."""

    message: bytes
    first: int
    end: int

    @property
    def num_bytes(self) -> int:
        return len(self.message) + EVENT_BYTES


@dataclass(eq=False, slots=True)
class _Reader:
    """One call that reads a record.

    Attributes:
        from_index: the first token it wants.
        place: number of the next event to take, counted from the first that the job produced.
        wake: set when there may be something new.
        written: cleared while an event is in the hands of gRPC.
        too_slow: it held the job up for too long; its call ends, and it alone.
    """

    from_index: int
    place: int
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    written: asyncio.Event = field(default_factory=asyncio.Event)
    too_slow: bool = False


class Replay:
    """What a job has produced, and who reads it. Belongs to the event loop's thread.

    Attributes:
        num_bytes: what it holds in memory.
        used_at: when it last changed, or was read (`loop.time()`, seconds).
        done: no more events come.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self.num_bytes = RECORD_BYTES
        self.done = False
        self._loop = asyncio.get_running_loop()
        self.used_at = self._loop.time()
        self._num_prompt_tokens = num_prompt_tokens
        self._readers: set[_Reader] = set()
        self._cancelled = False
        self._started: bytes | None = None
        self._tokens: deque[_TokenEvent] = deque()
        self._num_dropped = 0
        self._num_tokens = 0
        self._metrics: bytes | None = None
        self._end: bytes | None = None
        self._failure: Callable[[], TokenwireError] | None = None
        self._moved = asyncio.Event()

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    @property
    def is_held_up(self) -> bool:
        """Whether a reader has yet to take the oldest event."""
        return bool(self._behind()) and not self._cancelled

    # --- For the task that fills it. ---

    def set_started(self, message: bytes) -> None:
        self._started = message
        self._changed()

    def add(self, message: bytes) -> None:
        """Adds a `token` event. After `cancel` it is dropped."""
        if self._cancelled:
            return
        first, count = convert.token_span(message)
        event = _TokenEvent(message, first, first + count)
        self._tokens.append(event)
        self._num_tokens = event.end
        self.num_bytes += event.num_bytes
        self._changed()

    def set_metrics(self, message: bytes) -> None:
        self._metrics = message

    def finish(self, end: bytes | None, failure: Callable[[], TokenwireError] | None) -> None:
        """No more events: the job completed with this `end` event, or failed."""
        self.done = True
        if not self._cancelled:
            self._end, self._failure = end, failure
        self._changed()

    def drop_oldest(self) -> bool:
        """Forgets the oldest event; False if it is the only one, or a reader has yet to take it."""
        if len(self._tokens) < 2 or self._behind():
            return False
        self.num_bytes -= self._tokens.popleft().num_bytes
        self._num_dropped += 1
        return True

    async def wait_for_readers(self, timeout_s: float) -> None:
        """Waits until no reader needs the oldest event or the job is cancelled; fails those that take too long."""
        give_up_at = self._loop.time() + timeout_s
        while self._behind() and not self._cancelled:
            self._moved.clear()
            if not await wait_until(self._moved, give_up_at - self._loop.time()):
                self.fail_readers(self._behind())

    def fail_readers(self, readers: Iterable[_Reader] | None = None) -> None:
        """Ends calls that take nothing, or all; the job goes on, and they may attach again."""
        for reader in list(self._readers if readers is None else readers):
            reader.too_slow = True
            self._leave(reader)

    # --- For calls. ---

    def check(self, from_index: int) -> None:
        """Whether the stream can be given from this token on.

        Raises:
            TokenwireError: NOT_FOUND if tokens are no longer kept; INVALID_REQUEST for an index beyond the end.
        """
        if self._num_dropped and not self._cancelled and from_index < self._tokens[0].first:
            raise TokenwireError("NOT_FOUND", f"tokens before index {self._tokens[0].first} are no longer kept")
        if self._end is not None and from_index > self._num_tokens:
            raise self._beyond_end()

    async def read(self, from_index: int) -> AsyncGenerator[bytes, None]:
        """Yields serialised events to the terminal one. Raises the job's error after its `error` event."""
        reader = _Reader(from_index, self._num_dropped)
        reader.written.set()
        self._readers.add(reader)
        last: bytes | None = None
        try:
            while self._started is None and not self.done:
                await _woken(reader)
            if self._started is not None:
                yield self._started
            while (message := await self._next(reader)) is not None:
                reader.written.clear()
                last = message
                yield message
                reader.written.set()
                self.used_at = self._loop.time()
            yield self._metrics or convert.empty_metrics_event(self._num_prompt_tokens)
            failure = self._failure_of(reader)
            if failure is not None:
                yield convert.error_event(failure, last, from_index)
                raise failure
            if self._end is not None:
                yield self._end
        finally:
            reader.written.set()
            self._leave(reader)

    async def cancel(self, timeout_s: float) -> None:
        """Forgets every token. On return none is sent to any reader, and what one had in hand is written.

        The wait for that is bounded by `timeout_s`, since a client that does not read can hold it for ever.
        """
        self._cancelled = True
        self._end, self._failure = None, _cancelled
        self._num_dropped += len(self._tokens)
        self.num_bytes -= sum(event.num_bytes for event in self._tokens)
        self._tokens.clear()
        self._changed()
        self._moved.set()
        writes = [asyncio.ensure_future(reader.written.wait()) for reader in self._readers]
        if writes:
            _, late = await asyncio.wait(writes, timeout=timeout_s)
            for write in late:
                write.cancel()

    async def _next(self, reader: _Reader) -> bytes | None:
        """The next event for a reader, several in one if they wait; None when no token follows."""
        while not (reader.too_slow or self._cancelled):
            waiting = self._take(reader)
            if waiting:
                self._moved.set()
                return waiting[0] if len(waiting) == 1 else convert.merged_token_event(waiting)
            if self.done:
                return None
            await _woken(reader)
        return None

    def _take(self, reader: _Reader) -> list[bytes]:
        taken: list[bytes] = []
        num_tokens = num_bytes = 0
        while reader.place - self._num_dropped < len(self._tokens):
            event = self._tokens[reader.place - self._num_dropped]
            if event.end > reader.from_index:
                num_tokens += event.end - event.first
                num_bytes += len(event.message)
                if taken and (num_tokens > MAX_MERGED_TOKENS or num_bytes > MAX_MERGED_BYTES):
                    break
                taken.append(event.message)
            reader.place += 1
        return taken

    def _failure_of(self, reader: _Reader) -> TokenwireError | None:
        if self._failure is not None:
            return self._failure()
        if reader.too_slow:
            return TokenwireError("SLOW_CONSUMER")
        if self._end is None:
            return TokenwireError("INTERNAL")
        return self._beyond_end() if reader.from_index > self._num_tokens else None

    def _beyond_end(self) -> TokenwireError:
        most = self._num_tokens
        message = f"must be at most {most}, the number of tokens that the job produced"
        return invalid_request([FieldViolation("from_index", "RANGE", f"range(0..={most})", message)])

    def _behind(self) -> list[_Reader]:
        return [reader for reader in self._readers if reader.place <= self._num_dropped and self._tokens]

    def _changed(self) -> None:
        self.used_at = self._loop.time()
        for reader in self._readers:
            reader.wake.set()

    def _leave(self, reader: _Reader) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
            self.used_at = self._loop.time()
            reader.wake.set()
            self._moved.set()


async def _woken(reader: _Reader) -> None:
    reader.wake.clear()
    await reader.wake.wait()


def _cancelled() -> TokenwireError:
    return TokenwireError("CANCELLED")
