"""Rates and concurrency against a clock that the test moves."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwire.errors import TokenwireError
from tokenwire.security.limits import MAX_PRINCIPALS, WINDOW_S, Limiter, SlidingWindow
from tokenwire.security.principal import Principal, Quota, Scope


class FakeClock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def caller(name: str = "key:a", **limits: int) -> Principal:
    return Principal(name, name, frozenset(Scope), Quota(**limits))


def refusal(call: Any, *arguments: Any) -> TokenwireError:
    with pytest.raises(TokenwireError) as caught:
        call(*arguments)
    error = caught.value
    assert (error.code, error.row.grpc_status, error.row.http_status) == ("OVERLOADED", "RESOURCE_EXHAUSTED", 429)
    assert error.retry_after_ms is not None
    assert error.retry_after_ms >= 1
    return error


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), min_size=1, max_size=80),
    st.integers(5, 20),
    st.floats(0, 1e6),
)
def test_no_minute_ever_holds_more_than_the_limit(
    arrivals: list[tuple[float, int]], limit: int, start_s: float
) -> None:
    window = SlidingWindow()
    admitted: list[tuple[float, int]] = []
    now_s = start_s
    for gap_s, count in arrivals:
        now_s += gap_s
        wait_s = window.wait_s(count, limit, now_s)
        in_minute = sum(size for at_s, size in admitted if now_s - at_s < WINDOW_S)
        in_window = sum(size for at_s, size in admitted if now_s - at_s < WINDOW_S + 1)
        if wait_s == 0:
            assert in_minute + count <= limit
            window.add(count, now_s)
            admitted.append((now_s, count))
        else:
            # It refuses nothing that a window of one second more has room for, and its promise holds.
            assert in_window + count > limit
            assert 0 < wait_s <= WINDOW_S + 1
            later_s = now_s + wait_s
            assert window.total(now_s) >= limit - count + 1
            copy = SlidingWindow()
            for at_s, size in admitted:
                copy.add(size, at_s)
            assert copy.wait_s(count, limit, later_s + 1e-6 * max(1.0, later_s)) == 0


@pytest.mark.parametrize("start_s", [0.0, 0.999, 59.5, 1e9])
def test_a_full_window_says_exactly_when_there_is_room(start_s: float) -> None:
    clock = FakeClock(start_s)
    limiter = Limiter(Quota(), clock)
    one = caller(requests_per_minute=2)
    limiter.open(one).close()
    clock.now_s += 10
    limiter.open(one).close()
    error = refusal(limiter.open, one)
    assert (error.quota, error.limit) == ("requests_per_minute", 2)
    wait_s = (error.retry_after_ms or 0) / 1000
    assert 50 <= wait_s <= 51
    clock.now_s += wait_s - 0.002
    refusal(limiter.open, one)
    clock.now_s += 0.003
    limiter.open(one).close()
    refusal(limiter.open, one)


def test_a_refused_request_does_not_count() -> None:
    clock = FakeClock()
    limiter = Limiter(Quota(), clock)
    one = caller(requests_per_minute=1)
    limiter.open(one).close()
    for _ in range(1000):
        refusal(limiter.open, one)
    clock.now_s += WINDOW_S + 1
    limiter.open(one).close()


def test_a_request_refused_for_its_tokens_does_not_count_as_one() -> None:
    limiter = Limiter(Quota(requests_per_minute=2), FakeClock())
    one = caller(requests_per_minute=2, tokens_per_minute=100)
    limiter.open(one).reserve_tokens(90)
    for _ in range(10):
        request = limiter.open(one)
        assert refusal(request.reserve_tokens, 50).quota == "tokens_per_minute"
        request.close()
    limiter.open(one).reserve_tokens(10)
    assert refusal(limiter.open, one).quota == "requests_per_minute"


def test_one_callers_limit_is_not_anothers() -> None:
    limiter = Limiter(Quota(), FakeClock())
    limiter.open(caller("key:a", requests_per_minute=1))
    refusal(limiter.open, caller("key:a", requests_per_minute=1))
    limiter.open(caller("key:b", requests_per_minute=1))


def test_the_limit_of_all_holds_for_everyone_together() -> None:
    clock = FakeClock()
    limiter = Limiter(Quota(requests_per_minute=2), clock)
    limiter.open(caller("key:a"))
    limiter.open(caller("key:b"))
    error = refusal(limiter.open, caller("key:c"))
    assert error.message.startswith("the worker may")
    clock.now_s += WINDOW_S + 1
    limiter.open(caller("key:c"))


@pytest.mark.parametrize("whose", ["own", "all"])
def test_open_requests_are_capped_until_one_closes(whose: str) -> None:
    limiter = Limiter(Quota(concurrent_requests=2 if whose == "all" else 0), FakeClock())
    one = caller(concurrent_requests=2 if whose == "own" else 0)
    first, second = limiter.open(one), limiter.open(one)
    error = refusal(limiter.open, one)
    assert (error.quota, error.retry_after_ms) == ("concurrent_requests", 1000)
    first.close()
    first.close()
    third = limiter.open(one)
    refusal(limiter.open, one)
    second.close()
    third.close()


def test_tokens_are_reserved_then_settled() -> None:
    clock = FakeClock()
    limiter = Limiter(Quota(), clock)
    one = caller(tokens_per_minute=100)
    first = limiter.open(one)
    first.reserve_tokens(80)
    second = limiter.open(one)
    error = refusal(second.reserve_tokens, 30)
    assert (error.quota, error.limit) == ("tokens_per_minute", 100)
    first.settle_tokens(50)
    second.reserve_tokens(30)
    refusal(limiter.open(one).reserve_tokens, 30)
    # What came to more than was reserved counts from now on.
    clock.now_s += 30
    second.settle_tokens(45)
    refusal(limiter.open(one).reserve_tokens, 6)
    limiter.open(one).reserve_tokens(5)
    clock.now_s += 31
    limiter.open(one).reserve_tokens(80)


def test_settling_after_the_minute_changes_nothing_that_is_gone() -> None:
    clock = FakeClock()
    limiter = Limiter(Quota(), clock)
    one = caller(tokens_per_minute=100)
    request = limiter.open(one)
    request.reserve_tokens(100)
    clock.now_s += 120
    request.settle_tokens(10)
    limiter.open(one).reserve_tokens(100)
    refusal(limiter.open(one).reserve_tokens, 1)


def test_a_request_larger_than_the_limit_needs_an_empty_minute() -> None:
    clock = FakeClock()
    limiter = Limiter(Quota(), clock)
    one = caller(tokens_per_minute=100)
    limiter.open(one).reserve_tokens(1)
    refusal(limiter.open(one).reserve_tokens, 5000)
    clock.now_s += WINDOW_S + 1
    limiter.open(one).reserve_tokens(5000)
    refusal(limiter.open(one).reserve_tokens, 1)


def test_a_check_counts_nothing() -> None:
    limiter = Limiter(Quota(), FakeClock())
    one = caller(requests_per_minute=1)
    for _ in range(100):
        limiter.check(one)
    limiter.open(one)
    refusal(limiter.check, one)


def test_memory_is_bounded_under_any_number_of_names() -> None:
    limiter = Limiter(Quota(), FakeClock())
    open_one = limiter.open(caller("key:kept", concurrent_requests=1))
    for number in range(2 * MAX_PRINCIPALS):
        limiter.open(caller(f"cert:{number}", requests_per_minute=5)).close()
    tracemalloc.start()
    try:
        for number in range(3 * MAX_PRINCIPALS):
            limiter.open(caller(f"cert:again-{number}", requests_per_minute=5)).close()
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert limiter.num_remembered == MAX_PRINCIPALS
    # The names of one table's worth are new; the tables are not larger.
    assert grown < MAX_PRINCIPALS * 2000
    # One that is open is never forgotten, so its cap holds.
    refusal(limiter.open, caller("key:kept", concurrent_requests=1))
    open_one.close()


def test_without_limits_nothing_is_remembered() -> None:
    limiter = Limiter(Quota(), FakeClock())
    for number in range(1000):
        limiter.open(caller(f"cert:{number}")).reserve_tokens(10**9)
    assert limiter.num_remembered == 0
