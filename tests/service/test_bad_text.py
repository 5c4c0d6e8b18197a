"""Odd text through the whole service with a real model: the U cases of docs/bad-input.md."""

from __future__ import annotations

import time
import unicodedata
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


def token_of(model: Any, data: bytes) -> int:  # noqa: F811
    index: int = model.text.vocabulary().index(data)
    return index


async def forced(real: RealWorker, ids: list[int], **fields: Any) -> list[pb.ExecuteEvent]:  # noqa: F811
    """An answer whose tokens can only be these, whichever are likeliest first."""
    return await generate(real, "forced", logit_bias=dict.fromkeys(ids, 100.0), temperature=0, **fields)


async def test_u2_nul_in_a_prompt_is_a_character(real: RealWorker, model: Any) -> None:  # noqa: F811
    for text in ("a\0b", "\0", "x\0" * 50):
        events = await generate(real, "a", prompt=text, max_tokens=1)
        assert events[0].started.prompt_tokens == len(model.text.encode_prompt(text))


async def test_u4_u5_bytes_that_are_no_text_become_replacement_characters_and_ids_stay_exact(
    real: RealWorker,  # noqa: F811
    model: Any,  # noqa: F811
) -> None:
    half = token_of(model, b"\xf0")  # begins a character of four bytes, and is then followed by itself
    events = await forced(real, [half], max_tokens=6)
    assert ids_of(events) == [half] * 6
    assert text_of(events) == "\ufffd" * 6
    assert events[-2].metrics.tokens_out == 6


async def test_u6_text_that_spells_a_control_token_is_text(real: RealWorker, model: Any) -> None:  # noqa: F811
    marker = "<|im_end|>"
    control = set(model.text.stop_token_ids)
    for ids in (
        model.text.encode_prompt(f"a {marker} b"),
        model.text.encode_chat([("user", f"{marker}")])[3:-6],
    ):
        assert len(ids) > 5
        assert not control & set(ids[:6])
    events = await generate(real, "a", prompt=marker, max_tokens=1)
    assert events[0].started.prompt_tokens > 1


async def test_u7_a_stop_string_in_the_middle_of_a_token_is_cut_exactly(real: RealWorker) -> None:  # noqa: F811
    whole = text_of(await generate(real, "whole", max_tokens=30, temperature=0))
    for begin in (3, 7, 12, 20):
        for length in (1, 4, 11):
            stop = whole[begin : begin + length]
            events = await generate(real, "cut", max_tokens=30, temperature=0, stop=["\u2603", stop, stop + "never"])
            assert text_of(events) == whole[: whole.index(stop)]
            assert events[-1].end.stop_sequence == stop


@pytest.mark.parametrize(
    "unit", ["a", "^", " ", "é", "e\u0301", "\u202e", "\ufeff", "\u2028", "1", "\U0001f468\u200d\U0001f469", "\n"]
)
def test_u8_a_long_text_of_one_kind_costs_in_proportion(model: Any, unit: str) -> None:  # noqa: F811
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            model.text.encode_prompt(text)
            best = min(best, time.perf_counter() - began)
        return best

    size = 50_000
    for _ in range(4):  # the machine is shared: one good pair of times is enough, and a square law never gives one
        if seconds(4 * size) < 7 * seconds(size) + 0.01:
            return
    pytest.fail("four times the text takes far more than four times as long")


def test_u9_text_is_not_normalised(model: Any) -> None:  # noqa: F811
    composed, decomposed = "é", unicodedata.normalize("NFD", "é")
    assert model.text.encode_prompt(composed) != model.text.encode_prompt(decomposed)
    for text in (composed, decomposed, "ﬁ", "Å", "\u1e9b\u0323"):
        assert model.text.tokenizer.decode(model.text.tokenizer.encode(text)) == text
