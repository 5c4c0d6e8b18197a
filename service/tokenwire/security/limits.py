"""Rates over a sliding minute, and how many generations are open at one time: for each principal and for all together.

Memory is fixed for a principal, and the number of principals that are remembered is bounded.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from tokenwire.errors import RETRY_AFTER_MS, TokenwireError
from tokenwire.security.principal import Principal, Quota

WINDOW_S = 60
MAX_PRINCIPALS = 4096

Clock = Callable[[], float]


class SlidingWindow:
    """A sum over the last `WINDOW_S` seconds, counted by the second.

    What was added is in the sum for 60 to 61 seconds, so that no 60 seconds ever see more than the limit.
    """

    __slots__ = ("_counts", "_newest", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (WINDOW_S + 1)  # by second, modulo the length
        self._newest = 0
        self._total = 0

    def total(self, now_s: float) -> int:
        """The sum at `now_s`, seconds of any clock that does not go back."""
        second = int(now_s)
        length = len(self._counts)
        for gone in range(self._newest + 1, min(second, self._newest + length) + 1):
            self._total -= self._counts[gone % length]
            self._counts[gone % length] = 0
        self._newest = max(self._newest, second)
        return self._total

    def add(self, count: int, now_s: float) -> int:
        """Adds to the current second. Returns that second, for `correct`."""
        self.total(now_s)
        self._counts[self._newest % len(self._counts)] += count
        self._total += count
        return self._newest

    def correct(self, second: int, difference: int, now_s: float) -> None:
        """Changes what was added at `second`, if that is still in the sum. What is more counts from now on."""
        self.total(now_s)
        if difference > 0:
            self.add(difference, now_s)
        elif second > self._newest - len(self._counts):
            self._counts[second % len(self._counts)] += difference
            self._total += difference

    def wait_s(self, count: int, limit: int, now_s: float) -> float:
        """Seconds until `count` more fit below `limit`; 0 if they fit now. `count` may not exceed `limit`."""
        excess = self.total(now_s) + count - limit
        if excess <= 0:
            return 0.0
        length = len(self._counts)
        for second in range(self._newest - length + 1, self._newest + 1):
            excess -= self._counts[second % length]
            if excess <= 0:
                return second + length - now_s
        return float(length)


@dataclass(slots=True)
class _Use:
    requests: SlidingWindow
    tokens: SlidingWindow
    open: int = 0


@dataclass(slots=True)
class _Reservation:
    window: SlidingWindow
    second: int


def _fresh() -> _Use:
    return _Use(SlidingWindow(), SlidingWindow())


class Limiter:
    """Counts generations and their tokens against the quotas.

    Args:
        overall: limits of all principals together.
        clock: seconds; never goes back.
    """

    def __init__(self, overall: Quota, clock: Clock = time.monotonic) -> None:
        self._overall_quota = overall
        self._overall = _fresh()
        self._uses: OrderedDict[str, _Use] = OrderedDict()
        self._clock = clock

    @property
    def num_remembered(self) -> int:
        return len(self._uses)

    def check(self, principal: Principal) -> None:
        """Refuses a generation that `open` would refuse now, and counts nothing.

        Raises:
            TokenwireError: OVERLOADED with when a retry can help.
        """
        now_s = self._clock()
        known = self._uses.get(principal.name)
        if known is not None and principal.quota is not None:
            _require_room(known, principal.quota, now_s, "this credential")
        _require_room(self._overall, self._overall_quota, now_s, "the worker")

    def open(self, principal: Principal) -> OpenRequest:
        """Admits a generation; call `close` on what it returns.

        Raises:
            TokenwireError: OVERLOADED.
        """
        self.check(principal)
        counted = [(self._overall, self._overall_quota, "the worker")] if self._overall_quota else []
        if principal.quota:
            counted.insert(0, (self._use(principal.name), principal.quota, "this credential"))
        now_s = self._clock()
        for use, _, _ in counted:
            use.requests.add(1, now_s)
            use.open += 1
        return OpenRequest(counted, int(now_s), self._clock)

    def _use(self, name: str) -> _Use:
        use = self._uses.get(name)
        if use is None:
            if len(self._uses) >= MAX_PRINCIPALS:
                idle = next((other for other, its in self._uses.items() if not its.open), None)
                if idle is not None:  # else every one is in use, and so bounded by what the worker has open
                    del self._uses[idle]
            use = self._uses[name] = _fresh()
        self._uses.move_to_end(name)
        return use


class OpenRequest:
    """A generation that counts as open until `close`."""

    def __init__(self, counted: list[tuple[_Use, Quota, str]], second: int, clock: Clock) -> None:
        self._counted = counted
        self._second = second
        self._clock = clock
        self._reserved: list[_Reservation] = []
        self._num_reserved = 0
        self._closed = False

    def reserve_tokens(self, num_tokens: int) -> None:
        """Counts the tokens that the generation can come to, once its prompt is known.

        One that is larger than a whole minute's tokens needs a minute without any other.

        Raises:
            TokenwireError: OVERLOADED; nothing is counted then.
        """
        now_s = self._clock()
        limited = [(use, quota.tokens_per_minute, who) for use, quota, who in self._counted if quota.tokens_per_minute]
        for use, limit, who in limited:
            wait_s = use.tokens.wait_s(min(num_tokens, limit), limit, now_s)
            if wait_s > 0:
                for other, _, _ in self._counted:  # what is refused does not count
                    other.requests.correct(self._second, -1, now_s)
                raise _over("tokens_per_minute", f"{who} may use {limit} tokens in 60 seconds", limit, wait_s)
        self._reserved = [_Reservation(use.tokens, use.tokens.add(num_tokens, now_s)) for use, _, _ in limited]
        self._num_reserved = num_tokens

    def settle_tokens(self, num_tokens: int) -> None:
        """Says how many tokens the generation came to, in place of what was reserved."""
        now_s = self._clock()
        for reservation in self._reserved:
            reservation.window.correct(reservation.second, num_tokens - self._num_reserved, now_s)
        self._num_reserved = num_tokens

    def close(self) -> None:
        """The generation is over. Idempotent."""
        if not self._closed:
            self._closed = True
            for use, _, _ in self._counted:
                use.open -= 1


def _require_room(use: _Use, quota: Quota, now_s: float, who: str) -> None:
    limit = quota.concurrent_requests
    if limit and use.open >= limit:
        raise _over("concurrent_requests", f"{who} may have {limit} requests open at one time", limit, None)
    limit = quota.requests_per_minute
    if limit:
        wait_s = use.requests.wait_s(1, limit, now_s)
        if wait_s > 0:
            raise _over("requests_per_minute", f"{who} may send {limit} requests in 60 seconds", limit, wait_s)


def _over(quota: str, message: str, limit: int, wait_s: float | None) -> TokenwireError:
    retry_after_ms = RETRY_AFTER_MS if wait_s is None else max(1, math.ceil(wait_s * 1000))
    return TokenwireError("OVERLOADED", message, limit=limit, quota=quota, retry_after_ms=retry_after_ms)
