"""One generation over as many calls as it takes: what to send next, which events are new, and whether they are right.

The blocking and the asyncio stream drive the same session; it knows no connection.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import time
from collections import deque

import grpc

from tokenwire.client.errors import TokenwireRpcError, error_from_event
from tokenwire.client.events import End, Event, Metrics, Started, Token, event_from_proto
from tokenwire.client.retry import RetryPolicy, is_broken, is_resumable
from tokenwire.v1 import inference_pb2 as pb

Request = pb.ExecuteRequest | pb.AttachRequest


class Session:
    """The state of one stream.

    Use: send `request`, give every message to `receive` and the end of the call to `failed` or `ended`. Both raise if
    the generation failed; else either `over` is true, or they say how long to wait before `request` is sent again.
    `ready` holds the events for the caller.

    Args:
        request: an Execute, or an Attach to take up a stream that another client began.
        policy: of retries and of resuming.
        timeout_s: for the whole generation; None for no deadline.
    """

    def __init__(self, request: Request, policy: RetryPolicy, timeout_s: float | None) -> None:
        self.request = request
        self.ready: deque[Event] = deque()
        self.completed = False
        self.over = False
        self.num_calls = 1
        self.next_index = request.from_index if isinstance(request, pb.AttachRequest) else 0
        self._execute = request if isinstance(request, pb.ExecuteRequest) else None
        self._attach_token = request.attach_token
        self._policy = policy
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._starts = 1
        self._forsaken = False
        self._failures = 0
        self._stuck_since: float | None = None
        self._started: Started | None = None
        self._metrics: Metrics | None = None
        self._error_event: pb.Error | None = None
        # Of a stream that is read from its first token: everything that was handed out, to check what follows.
        self._ids_hash = hashlib.sha256() if self.next_index == 0 else None
        self._num_chars = 0
        # Where the present call is: whether it gave an event, index of its next token, and characters before that.
        self._call_began = False
        self._call_index = self.next_index
        self._call_chars = 0

    @property
    def job_id(self) -> str:
        return self.request.job_id

    @property
    def attach_token(self) -> str:
        """The secret that Attach needs; empty if the job is not detached."""
        return self._attach_token

    @property
    def detached(self) -> bool:
        return self._execute is None or self._execute.detach

    def remaining_s(self) -> float | None:
        """Seconds to the deadline, at least 0."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def receive(self, message: pb.ExecuteEvent) -> None:
        """Takes an event; what the caller has yet to see is added to `ready`.

        Raises:
            TokenwireRpcError: DIGEST_MISMATCH if the stream is not the one that was begun.
        """
        try:
            self._receive(message)
        except TokenwireRpcError:
            self.over = self._forsaken = True
            raise

    def _receive(self, message: pb.ExecuteEvent) -> None:
        self._call_began = True
        event = event_from_proto(message)
        if isinstance(event, Started):
            self._receive_started(event)
        elif isinstance(event, Token):
            self._receive_token(event)
        elif isinstance(event, Metrics):
            # The stream may still break: the caller must not get these twice.
            self._metrics = event
        elif isinstance(event, End):
            self._check(event.digest, event.tokens_out)
            self._flush_metrics()
            self.ready.append(event)
            self.completed = True
        elif isinstance(event, pb.Error):
            self._error_event = event  # the status with its details follows

    def ended(self) -> float:
        """The call is over and its status was OK. As `failed`, unless the stream is complete."""
        if self.completed:
            self.over = True
            return 0.0
        if self._error_event is not None:
            return self.failed(error_from_event(self._error_event))
        return self.failed(TokenwireRpcError("INTERNAL", "the stream ended without a terminal event"))

    def failed(self, error: TokenwireRpcError) -> float:
        """Decides what follows a failed call: seconds to wait before `request`, which may have changed, is sent.

        Raises:
            TokenwireRpcError: the generation failed.
        """
        if self.completed:  # only the status was lost
            self.over = True
            return 0.0
        self._error_event = None
        wait_s = self._next(error)
        remaining_s = self.remaining_s()
        if wait_s is None or (remaining_s is not None and wait_s >= remaining_s):
            self._forsaken = error.status is grpc.StatusCode.DEADLINE_EXCEEDED
            self.over = True
            self._flush_metrics()
            raise error
        self._metrics = None
        self._call_began = False
        self.num_calls += 1
        return wait_s

    @property
    def is_forsaken(self) -> bool:
        """Whether the generation failed here while the worker may still run it."""
        return self.detached and self._forsaken

    @property
    def error_event(self) -> pb.Error | None:
        """The `error` event of the present call, if it had one."""
        return self._error_event

    def _next(self, error: TokenwireRpcError) -> float | None:
        """Sets the next request; None if there is none."""
        self._failures += 1
        if self._started is None and self._failures >= self._policy.attempts:
            return None
        if self._started is None and self._execute is not None and not self._execute.detach:
            return self._start_again(error)
        return self._resume(error) if self.detached else None

    def _start_again(self, error: TokenwireRpcError) -> float | None:
        # A second start may meet the first, whose end the worker has not noticed yet.
        meets_itself = error.code == "ALREADY_EXISTS" and self._starts > 1
        may_start = self._policy.may_start_again(error, self._starts)
        if not may_start and not (meets_itself and self._starts < self._policy.attempts):
            return None
        self._starts += 1
        return self._policy.wait_s(self._failures, error.retry_after_s)

    def _resume(self, error: TokenwireRpcError) -> float | None:
        now = time.monotonic()
        if self._stuck_since is None:
            self._stuck_since = now
        retry_after_s = error.retry_after_s or 0.0
        if self._stuck_since + self._policy.resume_for_s < now + retry_after_s:
            return None
        if error.code == "NOT_FOUND" and isinstance(self.request, pb.AttachRequest) and self._execute is not None:
            # The worker does not know the job: it never arrived, or the worker is a new one. The same request with the
            # same seed gives the same bytes, and the digests will tell.
            self._send_execute(self._execute)
            self._failures -= 1  # it answered
            return self._policy.wait_s(self._failures) if self._failures > 1 else 0.0
        refused_first = self._started is None and self._starts == 1 and isinstance(self.request, pb.ExecuteRequest)
        if refused_first and not is_broken(error):
            return self._start_again(error)
        if isinstance(self.request, pb.ExecuteRequest) and not self._call_began and error.retry_after_s is not None:
            # The worker is not ready, and there is nothing to attach to.
            return self._policy.wait_s(self._failures, retry_after_s)
        if error.code == "ALREADY_EXISTS" or is_resumable(error):
            self._send_attach()
            # After a connection that worked the first try is at once.
            return 0.0 if self._failures == 1 else self._policy.wait_s(self._failures, retry_after_s)
        return None

    def _send_execute(self, execute: pb.ExecuteRequest) -> None:
        request = pb.ExecuteRequest()
        request.CopyFrom(execute)
        if self._started is not None:
            request.seed = self._started.seed
        self._starts += 1
        self.request = request
        self._call_index = self._call_chars = 0

    def _send_attach(self) -> None:
        self.request = pb.AttachRequest(job_id=self.job_id, from_index=self.next_index, attach_token=self._attach_token)
        self._call_index, self._call_chars = self.next_index, self._num_chars

    def _receive_started(self, event: Started) -> None:
        if self._started is None:
            self._started = event
            self._attach_token = event.attach_token or self._attach_token
            self.ready.append(event)
        elif (event.seed, event.model) != (self._started.seed, self._started.model):
            raise _mismatch(f"the stream of seed {self._started.seed} was taken up with seed {event.seed}")

    def _receive_token(self, event: Token) -> None:
        if event.index != self._call_index:
            raise _mismatch(f"token {self._call_index} was due, and token {event.index} came")
        end = event.index + len(event.ids)
        known_ids = min(max(self.next_index - event.index, 0), len(event.ids))
        known_chars = min(max(self._num_chars - self._call_chars, 0), len(event.text)) if known_ids else 0
        self._call_index = end
        self._call_chars += len(event.text)
        if known_ids == len(event.ids):
            return
        if known_ids:
            event = dataclasses.replace(
                event,
                text=event.text[known_chars:],
                index=self.next_index,
                ids=event.ids[known_ids:],
                logprobs=event.logprobs[known_ids:],
            )
        if self.detached and self._ids_hash is not None:
            self._ids_hash.update(struct.pack(f"<{len(event.ids)}I", *event.ids))
            self._check(event.digest, end)
        self.next_index = end
        self._num_chars += len(event.text)
        self._failures = 0
        self._stuck_since = None
        self.ready.append(event)

    def _check(self, digest: str, num_tokens: int) -> None:
        """Whether a digest, or its beginning, is that of everything handed out."""
        if not self.detached or self._ids_hash is None or not digest:
            return
        if not self._ids_hash.hexdigest().startswith(digest):
            raise _mismatch(f"the digest after {num_tokens} tokens is not that of the tokens that came")

    def _flush_metrics(self) -> None:
        if self._metrics is not None:
            self.ready.append(self._metrics)
            self._metrics = None


def _mismatch(message: str) -> TokenwireRpcError:
    return TokenwireRpcError("DIGEST_MISMATCH", message, status=grpc.StatusCode.DATA_LOSS)
