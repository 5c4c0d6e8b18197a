"""A worker process over the fake engine: `python fake_worker.py SCENARIO FLAGS-AS-JSON`; logs JSON to stderr.

Scenarios: `eager` finishes every job at once; `held` never ends one by itself; `dies` reports a dead engine at the
first client's job; `hangs` stops its heartbeat then, and never stops; `bad-model`, `no-device` fail the load;
`slow-load` loads until told to stop; `real` loads the model of the flags with the compiled engine; `stalls` does too,
and a job called `stall-MS` holds its engine's thread up for so long, as a step that hangs would.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import tokenwire.cli  # noqa: F401  (keeps the lines of gRPC itself out of the log)
from tokenwire.config import Settings
from tokenwire.config_sources import load_settings
from tokenwire.engine.fake import FakeEngine, FakeEngineError, FakeJob
from tokenwire.errors import NoDeviceError
from tokenwire.observe.logging import configure_logging
from tokenwire.process import run_loop
from tokenwire.server import serve
from tokenwire.startup import ProgressCallback


class Text:
    def encode_prompt(self, text: str) -> list[int]:
        return [ord(c) % 1000 for c in text]

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        return self.encode_prompt("".join(content for _, content in messages))

    def count_tokens(self, text: str) -> int:
        return len(text)

    def close(self) -> None:
        pass


class ScenarioEngine(FakeEngine):
    def __init__(self, scenario: str) -> None:
        super().__init__(eager=True)
        self.scenario = scenario

    def submit(self, **spec: Any) -> FakeJob:
        warm_up = spec["job_id"] == "tokenwire:warm-up"
        self.eager = warm_up or self.scenario == "eager"
        job = super().submit(**spec)
        if self.scenario == "held":
            job.step()
        if not warm_up and self.scenario == "dies":
            self.state.failure = "the loop thread threw"
        if not warm_up and self.scenario == "hangs":
            self.state.heartbeat_age_ms = 1e9
        return job

    def stop(self) -> None:
        if self.scenario == "hangs":
            threading.Event().wait()
        super().stop()


class StallingEngine:
    """The compiled engine with the fault of the scenario `stalls`."""

    def __init__(self, native: Any) -> None:
        self.native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def submit(self, **spec: Any) -> Any:
        kind, _, milliseconds = spec["job_id"].partition("-")
        if kind == "stall":
            self.native.inject_stall(int(milliseconds))
        return self.native.submit(**spec)


def load(settings: Settings, on_progress: ProgressCallback) -> Any:
    scenario = sys.argv[1]
    if scenario in ("real", "stalls"):
        from tokenwire.engine.load import load_model

        model = load_model(settings, on_progress)
        return dataclasses.replace(model, native=StallingEngine(model.native)) if scenario == "stalls" else model
    if scenario == "bad-model":
        raise FakeEngineError("MODEL_LOAD_FAILED", "tensor 3: offset past\nthe end of the file")
    if scenario == "no-device":
        raise NoDeviceError("device cuda:0 is not usable: no NVIDIA driver")
    if scenario == "slow-load":
        on_progress(25)
        tick = threading.Event()
        while True:
            tick.wait(0.01)
            on_progress(25)
    for percent in (0, 25, 50, 75, 100):
        on_progress(percent)
    return SimpleNamespace(
        native=ScenarioEngine(scenario),
        text=Text(),
        name="test-model",
        architecture="llama",
        quant_kind="Q4_1",
        tokenizer_kind="gguf-bpe",
        vocab_size=1000,
        context_length=4096,
        max_token_bytes=16,
        device="cpu",
        device_reason="asked for",
        device_name="",
        sm=0,
        cuda_runtime_version="",
        sizes={},
        warnings=("an oddity",),
        grammar_compiler=None,
    )


if __name__ == "__main__":
    settings = load_settings({"model": "test.gguf", "port": 0, **json.loads(sys.argv[2])}, environ={})
    configure_logging(settings.log_level, "json")
    sys.exit(run_loop(serve(settings, load)))
