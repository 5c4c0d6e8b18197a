"""What a request may ask for, over the compiled engine and a real model: each parameter against what it promises."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from service.test_real_engine import (  # noqa: F401 - its fixtures
    RealWorker,
    device,
    generate,
    ids_of,
    model,
    real,
    text_of,
)
from tokenwire.v1 import inference_pb2 as pb

CHAT = pb.Chat(
    messages=[
        pb.ChatMessage(role="system", content="You are brief."),
        pb.ChatMessage(role="user", content="Name a colour."),
        pb.ChatMessage(role="assistant", content="Red."),
        pb.ChatMessage(role="user", content="Another."),
    ]
)


def entries(events: list[pb.ExecuteEvent]) -> list[pb.TokenLogprob]:
    return [entry for event in events for entry in event.token.logprobs]


async def test_logprobs_have_the_twenty_most_probable_with_text_and_bytes(
    real: RealWorker,  # noqa: F811
    model: Any,  # noqa: F811
) -> None:
    vocabulary = model.text.vocabulary()
    events = await generate(real, "a", max_tokens=12, seed=3, logprobs=20)
    listed = entries(events)
    assert [entry.id for entry in listed] == ids_of(events)
    for entry in listed:
        assert entry.raw == vocabulary[entry.id]
        assert entry.t == entry.raw.decode("utf-8", "replace")
        assert len(entry.top) == 20
        assert [(-top.logprob, top.id) for top in entry.top] == sorted((-top.logprob, top.id) for top in entry.top)
        assert all(top.raw == vocabulary[top.id] for top in entry.top)
        assert 0.05 < sum(math.exp(top.logprob) for top in entry.top) < 1.00001
        among = {top.id: top.logprob for top in entry.top}
        assert among.get(entry.id, entry.logprob) == entry.logprob <= entry.top[0].logprob


async def test_logprobs_are_of_the_distribution_before_temperature_and_filters(real: RealWorker) -> None:  # noqa: F811
    plain = entries(await generate(real, "a", max_tokens=1, seed=3, logprobs=5))[0]
    shaped: dict[str, Any] = {"temperature": 0.1, "top_k": 2, "top_p": 0.5, "logit_bias": {plain.id: -100.0}}
    other = entries(await generate(real, "b", max_tokens=1, seed=4, logprobs=5, **shaped))[0]
    assert [(top.id, top.logprob) for top in other.top] == [(top.id, top.logprob) for top in plain.top]
    zero = entries(await generate(real, "c", max_tokens=1, seed=3, logprobs=0))[0]
    assert (zero.id, zero.logprob, len(zero.top)) == (plain.id, plain.logprob, 0)
    assert entries(await generate(real, "d", max_tokens=1, seed=3)) == []


async def test_logprobs_travel_with_their_tokens_when_text_is_held_back(real: RealWorker) -> None:  # noqa: F811
    whole = text_of(await generate(real, "whole", max_tokens=24, temperature=0))
    stops = [whole[20:24] + "\u2603", whole[4:9] + "\u2603"]  # begin as the text does, and never come
    events = await generate(real, "held", max_tokens=24, temperature=0, stop=stops, logprobs=1)
    assert text_of(events) == whole
    tokens = [event.token for event in events if event.HasField("token")]
    assert all([entry.id for entry in token.logprobs] == list(token.ids) for token in tokens)
    assert max(len(token.ids) for token in tokens) > 1


@pytest.mark.parametrize(("frequency", "presence"), [(0.0, 2.0), (2.0, 0.0), (1.5, -0.5), (-2.0, 0.0)])
async def test_penalties_move_the_choice_by_exactly_their_amount(
    real: RealWorker,  # noqa: F811
    frequency: float,
    presence: float,
) -> None:
    events = await generate(
        real,
        "a",
        prompt="one two one two one two one two",
        max_tokens=24,
        temperature=0,
        logprobs=20,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    counts: Counter[int] = Counter()
    moved = 0
    for entry in entries(events):
        scores = {
            top.id: top.logprob - frequency * counts[top.id] - presence * (counts[top.id] > 0) for top in entry.top
        }
        best = max(scores.values())
        if entry.id in scores:  # beyond the twenty there is nothing to compare with
            assert scores[entry.id] >= best - 1e-3
        moved += entry.id != entry.top[0].id
        counts[entry.id] += 1
    assert moved > 0


async def test_repetition_is_discouraged_or_encouraged(real: RealWorker) -> None:  # noqa: F811
    async def distinct(penalty: float | None) -> int:
        fields = {} if penalty is None else {"repetition_penalty": penalty}
        return len(
            set(ids_of(await generate(real, "a", prompt="la la la la la", max_tokens=40, temperature=0, **fields)))
        )

    assert await distinct(2.0) > await distinct(None)
    assert await distinct(1.0) == await distinct(None)


async def test_bias_forbids_and_forces(real: RealWorker) -> None:  # noqa: F811
    first = ids_of(await generate(real, "a", max_tokens=1, temperature=0))[0]
    assert ids_of(await generate(real, "b", max_tokens=1, temperature=0, logit_bias={first: -100.0}))[0] != first
    forced = await generate(real, "c", max_tokens=8, temperature=2, logit_bias={500: 100.0}, seed=1)
    assert ids_of(forced) == [500] * 8


async def test_a_seed_is_echoed_and_repeats_the_answer(real: RealWorker) -> None:  # noqa: F811
    drawn = await generate(real, "a", max_tokens=16)
    seed = drawn[0].started.seed
    again = await generate(real, "b", max_tokens=16, seed=seed)
    assert again[0].started.seed == seed
    assert ids_of(again) == ids_of(drawn)
    assert again[-1].end.digest == drawn[-1].end.digest
    others = {
        tuple(ids_of(await generate(real, f"c{n}", max_tokens=16, seed=seed + n + 1 & 2**64 - 1))) for n in range(4)
    }
    assert len(others) > 1


async def test_a_chat_is_what_the_models_template_makes_of_it(real: RealWorker, model: Any) -> None:  # noqa: F811
    rendered = model.text.encode_chat([(message.role, message.content) for message in CHAT.messages])
    chat = await generate(real, "a", prompt=None, chat=CHAT, max_tokens=16, temperature=0)
    ids = await generate(real, "b", prompt=None, prompt_tokens=pb.TokenIds(ids=rendered), max_tokens=16, temperature=0)
    assert chat[0].started.prompt_tokens == ids[0].started.prompt_tokens == len(rendered)
    assert ids_of(chat) == ids_of(ids)


async def test_of_several_stops_the_first_in_the_text_counts(real: RealWorker) -> None:  # noqa: F811
    whole = text_of(await generate(real, "whole", max_tokens=24, temperature=0))
    late, early = whole[22:27], whole[9:13]
    events = await generate(real, "cut", max_tokens=24, temperature=0, stop=[late, "\u2603", early])
    assert text_of(events) == whole[: whole.index(early)]
    assert events[-1].end.stop_sequence == early


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}],
    ids=lambda fields: next(iter(fields)),
)
async def test_the_narrowest_filter_is_greedy(real: RealWorker, fields: dict[str, float]) -> None:  # noqa: F811
    greedy = ids_of(await generate(real, "a", max_tokens=12, temperature=0))
    assert ids_of(await generate(real, "b", max_tokens=12, seed=9, **fields)) == greedy


async def test_priorities_change_no_byte(real: RealWorker) -> None:  # noqa: F811
    answers = [ids_of(await generate(real, f"p{n}", max_tokens=8, seed=1, priority=n)) for n in (-2, 0, 2)]
    assert answers[0] == answers[1] == answers[2]
