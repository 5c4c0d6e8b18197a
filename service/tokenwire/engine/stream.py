"""One job as its reader sees it: an asynchronous iteration of serialised events with exactly one outcome."""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tokenwire.engine.native import NativeEngine, NativeJob, NativeOutcome
from tokenwire.errors import TokenwireError, from_engine_error, from_outcome
from tokenwire.waiting import wait_until

# First byte of a serialised ExecuteEvent: the field number of its oneof, length-delimited.
STARTED_TAG = 1 << 3 | 2
TOKEN_TAG = 2 << 3 | 2
METRICS_TAG = 3 << 3 | 2
END_TAG = 4 << 3 | 2

# Makes the error anew for each stream: an exception object that is raised in many places gathers all their tracebacks.
ErrorFactory = Callable[[], TokenwireError]


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A validated generation; fields as `_native.Engine.submit` takes them."""

    job_id: str
    model: str
    prompt_ids: Sequence[int]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int = -1
    stop: Sequence[bytes] = ()
    timeout_ms: int = 0
    cache_salt: bytes = b""
    separate_events: bool = False
    priority: int = 0
    grammar: object | None = None


class CancelOutcome(enum.Enum):
    CANCELLED = "CANCELLED"
    ALREADY_FINISHED = "ALREADY_FINISHED"
    NOT_FOUND = "NOT_FOUND"


@dataclass(frozen=True, slots=True)
class CancelResult:
    outcome: CancelOutcome
    tokens_out: int


class JobStream:
    """A live job id, from before its prompt is tokenised until its last event is written.

    Iterate to receive events; asking for the next one says that the last was written, which is what `cancel` relies
    on. Afterwards `failure` says how the stream ends. Made by `AsyncEngine.open`, used as a context manager; leaving it
    stops the job if it still runs. Belongs to the event loop's thread.

    Attributes:
        outcome: the engine's word on the job; None until that has come.
        metrics_sent: whether the `metrics` event was handed out.
        last_token: the last `token` event handed out; None before the first.
    """

    def __init__(
        self, job_id: str, on_start: Callable[[JobStream, NativeJob], None], on_close: Callable[[JobStream], None]
    ) -> None:
        self.job_id = job_id
        self.metrics_sent = False
        self.last_token: bytes | None = None
        self.outcome: NativeOutcome | None = None
        self._on_start = on_start
        self._on_close = on_close
        self._job: NativeJob | None = None
        self._pending: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._cancelled = False
        self._error: ErrorFactory | None = None
        self._end_sent = False
        self._closed = False
        self._decided = False

    def __enter__(self) -> JobStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, native: NativeEngine, spec: JobSpec) -> None:
        """Queues the job, unless it was cancelled while it was prepared.

        Raises:
            TokenwireError: the engine refused it, or failed meanwhile.
        """
        if self._error is not None:
            raise self._error()
        if self._cancelled:
            return
        try:
            self._job = native.submit(
                job_id=spec.job_id,
                model=spec.model,
                prompt_ids=spec.prompt_ids,
                max_tokens=spec.max_tokens,
                temperature=spec.temperature,
                top_p=spec.top_p,
                top_k=spec.top_k,
                min_p=spec.min_p,
                repetition_penalty=spec.repetition_penalty,
                frequency_penalty=spec.frequency_penalty,
                presence_penalty=spec.presence_penalty,
                logit_bias=spec.logit_bias,
                logprobs=spec.logprobs,
                stop=spec.stop,
                seed=spec.seed,
                timeout_ms=spec.timeout_ms,
                cache_salt=spec.cache_salt,
                separate_events=spec.separate_events,
                priority=spec.priority,
                grammar=spec.grammar,
            )
        except Exception as error:
            if not hasattr(error, "code"):
                raise
            raise from_engine_error(error) from error
        self._on_start(self, self._job)

    def __aiter__(self) -> JobStream:
        return self

    async def __anext__(self) -> bytes:
        self._written.set()
        while True:
            while self._pending:
                message = self._pending.popleft()
                tag = message[0]
                stopped = self._cancelled or self._error is not None
                if stopped and tag in (TOKEN_TAG, END_TAG):
                    continue
                if tag == TOKEN_TAG:
                    self.last_token = message
                self._end_sent = self._end_sent or tag == END_TAG
                self.metrics_sent = self.metrics_sent or tag == METRICS_TAG
                self._written.clear()
                return message
            if self._job is None or self.outcome is not None or self._error is not None:
                self._decided = True
                raise StopAsyncIteration
            await self._wake.wait()
            self._wake.clear()
            if self._error is None:
                messages, self.outcome = self._job.take()
                self._pending.extend(messages)

    @property
    def failure(self) -> TokenwireError | None:
        """How the stream must end once iteration is over: None after `end`, else the error."""
        if self._end_sent:
            return None
        if self._error is not None:
            return self._error()
        if self._cancelled:
            return TokenwireError("CANCELLED")
        if self.outcome is not None and self.outcome.error_code:
            return from_outcome(self.outcome.error_code, self.outcome.error_message)
        return TokenwireError("INTERNAL")

    @property
    def tokens_out(self) -> int:
        """Tokens generated so far."""
        if self.outcome is not None:
            return self.outcome.tokens_out
        return self._job.num_tokens_out if self._job is not None else 0

    def notify(self) -> None:
        """The job has output to take."""
        self._wake.set()

    def fail(self, error: ErrorFactory) -> None:
        """Ends the stream with an error without asking the engine, for when the engine no longer answers."""
        if self._error is None and not self._decided:
            self._error = error
            self._wake.set()

    async def cancel(self, timeout_s: float) -> CancelResult:
        """Stops the job. On return no token event will be handed out, and the one in hand is written.

        The wait for that one is bounded by `timeout_s`, since a client that does not read can hold it for ever.
        """
        tokens_out = self.tokens_out
        live = not (self._end_sent or self._decided or self._closed)
        if live:
            self._cancelled = True
            if self._job is not None and self.outcome is None:
                tokens_out = self._job.cancel()
            self._wake.set()
        # The write in hand is older than this call: a reader that takes nothing must not hold the canceller.
        await wait_until(self._written, timeout_s)
        return CancelResult(CancelOutcome.CANCELLED if live else CancelOutcome.ALREADY_FINISHED, tokens_out)

    def close(self) -> None:
        """Stops the job if it still runs and frees the id. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._job is not None and self.outcome is None:
            self._job.cancel()
        self._written.set()
        self._on_close(self)

    @property
    def known(self) -> bool:
        """Whether the id is worth remembering: its job was queued or cancelled, not refused."""
        return self._job is not None or self._cancelled

    @property
    def handle(self) -> int | None:
        return self._job.handle if self._job is not None else None
