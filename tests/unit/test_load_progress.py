"""The progress of a load reaches its reporter in order and whole, and the reporter can abandon it (W-40)."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tokenwire._native import Engine, EngineOptions, GgufFile
from unit.gguf_builder import TinyModel, tiny_llama


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    return tiny_llama(tmp_path / "model.gguf")


def load(tiny: TinyModel, report: object) -> Engine:
    options = EngineOptions()
    options.num_threads = 1
    return Engine(GgufFile(str(tiny.path)), [b"x"] * tiny.vocab_size, [], options, report)  # type: ignore[arg-type]


def test_all_five_steps_arrive_in_order_before_the_engine_is_there(tiny: TinyModel) -> None:
    seen: list[int] = []

    def report(percent: int) -> None:
        time.sleep(0.02)  # slower than the load of so small a model
        seen.append(percent)

    engine = load(tiny, report)
    assert seen == [0, 25, 50, 75, 100]
    engine.stop()


@pytest.mark.parametrize("at", [0, 50, 100])
def test_what_the_reporter_raises_ends_the_load(tiny: TinyModel, at: int) -> None:
    seen: list[int] = []

    def report(percent: int) -> None:
        seen.append(percent)
        if percent == at:
            raise KeyError("abandoned")

    before = threading.active_count()
    with pytest.raises(KeyError, match="abandoned"):
        load(tiny, report)
    assert seen[-1] == at  # nothing is reported after it
    assert threading.active_count() == before


def test_a_load_that_fails_reports_no_end(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "model.gguf", drop_tensors=["blk.1.ffn_down.weight"])
    seen: list[int] = []
    with pytest.raises(Exception, match="ffn_down"):
        load(tiny, seen.append)
    assert 100 not in seen
