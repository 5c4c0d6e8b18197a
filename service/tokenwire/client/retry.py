"""When a call is made again, and how long to wait before it. No clock, no sleep and no connection in here."""

from __future__ import annotations

import random
from dataclasses import dataclass

import grpc

from tokenwire.client.errors import TokenwireRpcError

# What gRPC reports when the connection, and not the worker, ended a call: lost, reset, or cut off by a proxy.
_BROKEN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
    }
)

# Errors of the worker after which a detached job's stream can still be had: the worker stops or restarts, this reader
# was too slow, or too many read already.
_RESUMABLE = frozenset({"UNAVAILABLE", "CUDA_ERROR", "SLOW_CONSUMER", "OVERLOADED"})


@dataclass(frozen=True)
class RetryPolicy:
    """How a client behaves when a call fails. Waits are drawn between 0 and a bound that doubles (full jitter).

    A generation is started again only if nothing of it arrived, and only where that can help: the worker could not be
    reached, or it refused and said when to come back. A detached generation that broke later is taken up again.

    Attributes:
        attempts: how often a generation is started, the first time included; 1 never tries again.
        first_wait_s, most_wait_s: bounds of the first wait and of every wait, seconds. A worker that asks for a longer
            one than `most_wait_s` is not waited for.
        resume_for_s: how long a broken detached stream is tried for without a new token, seconds; 0 never resumes.
    """

    attempts: int = 3
    first_wait_s: float = 0.1
    most_wait_s: float = 5.0
    resume_for_s: float = 60.0

    def wait_s(self, failures: int, retry_after_s: float | None = None) -> float:
        """Seconds to wait after this many failures in a row, at least what the worker asked for."""
        bound = min(self.most_wait_s, self.first_wait_s * 2 ** min(failures - 1, 30))
        jitter = random.uniform(0, bound)  # noqa: S311 - spreads clients out; nothing is secret here
        return (retry_after_s or 0.0) + jitter

    def may_start_again(self, error: TokenwireRpcError, starts: int) -> bool:
        """Whether a generation of which nothing arrived may be sent again."""
        if starts >= self.attempts or error.pushed_back:
            return False
        if error.retry_after_s is not None:
            return error.retry_after_s <= self.most_wait_s
        return is_broken(error) and error.status is grpc.StatusCode.UNAVAILABLE


DEFAULT_RETRY = RetryPolicy()

NO_RETRY = RetryPolicy(attempts=1, resume_for_s=0)
"""Every failure is reported at once."""


def is_broken(error: TokenwireRpcError) -> bool:
    """Whether the connection failed, rather than the worker answered."""
    return not error.from_worker and error.status in _BROKEN


def is_resumable(error: TokenwireRpcError) -> bool:
    """Whether the rest of a detached stream may still be had."""
    return is_broken(error) or (error.code in _RESUMABLE and not error.pushed_back)
