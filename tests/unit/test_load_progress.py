"""The progress of a load reaches its reporter in order and whole, and whoever is asked meanwhile can end it (W-40)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenwire._native import Engine, EngineError, EngineOptions, GgufFile
from tokenwire.config_sources import load_settings
from tokenwire.engine.load import load_model
from tokenwire.text.errors import TokenizerError
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


def load_beside(tiny: TinyModel, read: Callable[[], tuple[list[bytes], list[int]]]) -> Engine:
    options = EngineOptions()
    options.num_threads = 1
    return Engine.load_beside(GgufFile(str(tiny.path)), read, options)


def test_the_vocabulary_may_come_later_than_the_weights(tiny: TinyModel) -> None:
    made = threading.Event()
    threading.Timer(0.2, made.set).start()

    def read() -> tuple[list[bytes], list[int]]:
        assert made.wait(10)
        return [b"x"] * tiny.vocab_size, [1]

    engine = load_beside(tiny, read)
    assert engine.model_info.vocab_size == tiny.vocab_size
    engine.stop()


def test_what_reading_the_vocabulary_raises_ends_the_load(tiny: TinyModel) -> None:
    def read() -> tuple[list[bytes], list[int]]:
        raise KeyError("no vocabulary")

    before = threading.active_count()
    with pytest.raises(KeyError, match="no vocabulary"):
        load_beside(tiny, read)
    assert threading.active_count() == before


def test_a_vocabulary_of_another_size_ends_the_load(tiny: TinyModel) -> None:
    with pytest.raises(EngineError, match="the tokenizer has 3 tokens, the model"):
        load_beside(tiny, lambda: ([b"x"] * 3, []))


def test_a_model_whose_tokenizer_is_malformed_is_given_up_with_its_error(tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "model.gguf", drop_keys=["tokenizer.ggml.merges"])
    settings = load_settings({"model": str(tiny.path), "device": "cpu", "num_threads": 1}, environ={})
    before = threading.active_count()
    with pytest.raises(TokenizerError, match="merges"):
        load_model(settings, lambda percent: None)
    assert threading.active_count() == before
