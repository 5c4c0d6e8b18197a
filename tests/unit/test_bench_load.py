"""When a load sends, and what its figures are, against answers whose times are known."""

from __future__ import annotations

import asyncio
import statistics
import time
import xml.etree.ElementTree as ET

import pytest

from tokenwire.bench.chart import render_svg
from tokenwire.bench.load import (
    Answer,
    Arrival,
    Record,
    closed_loop,
    num_connections,
    open_loop,
    poisson_offsets,
    random_prompt,
)
from tokenwire.bench.summary import Distribution, Summary, event_gaps_ms, percentile, token_gaps_ms


def record(due_s: float, *arrivals: tuple[float, int], ended_s: float | None = None, **answer: object) -> Record:
    events = tuple(Arrival(at_s, num_tokens) for at_s, num_tokens in arrivals)
    ended_s = (events[-1].at_s if events else due_s) if ended_s is None else ended_s
    fields = {"stop_reason": "max_tokens", **answer}
    return Record(due_s=due_s, sent_s=due_s, ended_s=ended_s, answer=Answer(events, **fields))  # type: ignore[arg-type]


async def test_closed_loop_keeps_its_number_of_requests_under_way() -> None:
    under_way: set[int] = set()
    seen: list[int] = []
    most = 0

    async def send(number: int) -> Answer:
        nonlocal most
        seen.append(number)
        under_way.add(number)
        most = max(most, len(under_way))
        for _ in range(number % 3 + 1):
            await asyncio.sleep(0)
        # All clients are busy as long as there are requests left to send.
        assert len(under_way) == 4 or len(seen) in (1, 2, 3, 20)
        under_way.remove(number)
        return Answer()

    records = await closed_loop(send, 20, 4)
    assert (seen, len(records), most) == (list(range(20)), 20, 4)


async def test_closed_loop_of_nothing_sends_nothing() -> None:
    async def send(number: int) -> Answer:
        raise AssertionError

    assert await closed_loop(send, 0, 4) == []


async def test_open_loop_waits_for_no_answer() -> None:
    all_sent = asyncio.Event()
    sent: list[int] = []

    async def send(number: int) -> Answer:
        sent.append(number)
        if len(sent) == 5:
            all_sent.set()
        await all_sent.wait()  # the first answer ends only after the last request was sent
        return Answer()

    records = await asyncio.wait_for(open_loop(send, [0.0, 0.01, 0.02, 0.03, 0.04]), 20)
    assert sent == [0, 1, 2, 3, 4]
    assert [round(later.due_s - records[0].due_s, 6) for later in records] == [0.0, 0.01, 0.02, 0.03, 0.04]


async def test_a_late_request_waits_from_when_it_was_due() -> None:
    async def send(number: int) -> Answer:
        if number == 0:
            time.sleep(0.05)  # noqa: ASYNC251 - a client that is short of time holds up its own loop
        return Answer((Arrival(time.perf_counter(), 1),))

    summary = Summary.of(await open_loop(send, [0.0, 0.001]))
    assert summary.send_lag_ms is not None
    assert summary.send_lag_ms.most >= 48
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.most >= 48


async def test_a_broken_sender_ends_the_loop_and_its_other_requests() -> None:
    cancelled = asyncio.Event()

    async def send(number: int) -> Answer:
        if number == 1:
            raise RuntimeError("broken")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Answer()

    with pytest.raises(RuntimeError, match="broken"):
        await closed_loop(send, 2, 2)
    assert cancelled.is_set()


def test_poisson_arrivals_have_the_rate_and_the_spread_and_repeat_for_a_seed() -> None:
    offsets = poisson_offsets(20_000, 50.0, seed=7)
    gaps = [later - earlier for earlier, later in zip([0.0, *offsets], offsets, strict=False)]
    assert min(gaps) > 0
    # An exponential distribution's deviation equals its mean; the bounds are 7 standard errors wide.
    assert statistics.fmean(gaps) == pytest.approx(0.02, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(0.02, rel=0.1)
    assert offsets == poisson_offsets(20_000, 50.0, seed=7)
    assert offsets != poisson_offsets(20_000, 50.0, seed=8)


def test_prompts_are_distinct_repeatable_and_inside_the_vocabulary() -> None:
    prompts = [random_prompt(number, 16, 49152, seed=3) for number in range(200)]
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 200
    assert prompts[5] == random_prompt(5, 16, 49152, seed=3)
    assert prompts[5] != random_prompt(5, 16, 49152, seed=4)
    assert all(1000 <= token_id < 49152 for prompt in prompts for token_id in prompt)
    assert all(0 <= token_id < 40 for token_id in random_prompt(0, 500, 40, seed=0))


def test_connections_stay_below_a_workers_streams_a_connection() -> None:
    assert [num_connections(streams) for streams in (1, 50, 51, 400)] == [1, 1, 2, 8]


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 1.0) == 4.0
    assert percentile([5.0], 0.99) == 5.0
    values = sorted(float(value * 37 % 101) for value in range(101))
    assert percentile(values, 0.95) == statistics.quantiles(values, n=20, method="inclusive")[-1]


def test_percentiles_that_the_sample_cannot_carry_are_not_given() -> None:
    for count, known in (
        (0, None),
        (1, (False, False)),
        (19, (False, False)),
        (20, (True, False)),
        (100, (True, True)),
    ):
        distribution = Distribution.of(float(value) for value in range(count))
        assert (distribution and (distribution.p95 is not None, distribution.p99 is not None)) == known


def test_tokens_of_one_event_share_its_time_and_the_first_event_has_none() -> None:
    arrivals = (Arrival(1.0, 3), Arrival(1.25, 1), Arrival(1.75, 2))
    assert event_gaps_ms(arrivals) == [250.0, 500.0]
    assert token_gaps_ms(arrivals) == [250.0, 250.0, 250.0]
    assert token_gaps_ms(arrivals[:1]) == token_gaps_ms(()) == []


def test_figures_of_two_answers_that_overlap() -> None:
    summary = Summary.of(
        [
            record(10.0, (10.5, 1), (10.75, 1), (11.0, 2), prompt_tokens=5, cached_tokens=4, queue_ms=3.0),
            record(10.5, (11.5, 1), (12.0, 1), prompt_tokens=6, queue_ms=5.0, stop_reason="eos"),
        ]
    )
    assert (summary.completed, summary.errors, summary.duration_s) == (2, {}, 2.0)
    assert (summary.tokens_out, summary.tokens_per_second, summary.requests_per_second) == (6, 3.0, 1.0)
    assert (summary.prompt_tokens, summary.cached_tokens) == (11, 4)
    assert summary.stop_reasons == {"max_tokens": 1, "eos": 1}
    assert summary.tokens_per_event == 6 / 5
    ttft, itl, gap = summary.ttft_ms, summary.itl_ms, summary.event_gap_ms
    assert ttft is not None
    assert (ttft.count, ttft.least, ttft.p50, ttft.most) == (2, 500.0, 750.0, 1000.0)
    assert itl is not None
    assert (itl.count, itl.least, itl.mean, itl.most) == (4, 125.0, 250.0, 500.0)
    assert gap is not None
    assert (gap.count, gap.least, gap.p50) == (3, 250.0, 250.0)
    assert summary.queue_ms is not None
    assert summary.queue_ms.mean == 4.0


def test_a_failed_request_counts_as_an_error_and_for_the_duration_alone() -> None:
    failed = record(0.0, (0.1, 100), ended_s=8.0, error_code="OVERLOADED", queue_ms=900.0)
    summary = Summary.of([failed, record(0.0, (1.0, 1), (2.0, 3))])
    assert (summary.completed, summary.errors) == (1, {"OVERLOADED": 1})
    assert (summary.tokens_out, summary.duration_s, summary.tokens_per_second) == (4, 8.0, 0.5)
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.most == 1000.0
    assert summary.queue_ms is None


def test_a_run_without_an_answer_has_no_latency() -> None:
    summary = Summary.of([record(0.0, ended_s=1.0, error_code="UNAVAILABLE")])
    assert (summary.completed, summary.tokens_per_second, summary.tokens_per_event) == (0, 0.0, None)
    assert summary.ttft_ms is summary.itl_ms is summary.latency_ms is None
    assert summary.send_lag_ms is not None


def test_the_chart_shows_each_known_percentile_to_scale() -> None:
    records = [record(0.0, *((at_s, 1) for at_s in (0.25, *(0.25 + 0.001 * step for step in range(1, 102)))))]
    svg = ET.fromstring(render_svg(Summary.of(records), "a <model> & more", "load"))  # noqa: S314 - our own text
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == ["a <model> & more", "load"]
    assert [text for text in texts if text and text.startswith("p")] == ["p50", "p50", "p95", "p99"]
    assert "250.0" in texts
    widths = [float(bar.attrib["width"]) for bar in svg.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(widths) == 4
    assert max(widths) <= 400
    assert render_svg(Summary.of([record(0.0, error_code="X")]), "", "").count("<rect") == 0
