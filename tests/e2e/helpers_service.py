"""The whole service in this process, over the compiled engine and a tiny model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.helpers import make_engine, settle
from tokenwire import _native
from tokenwire.config_sources import load_settings
from tokenwire.engine import AsyncEngine
from tokenwire.rpc.server import build_server
from tokenwire.rpc.state import ModelFacts, Phase, Serving, WorkerState
from tokenwire.rpc.validate import Limits
from tokenwire.text import load_text


@dataclass
class Service:
    port: int
    native: Any
    engine: AsyncEngine


@contextlib.asynccontextmanager
async def serving(path: Path, settings: dict[str, Any] | None = None, **engine_options: Any) -> AsyncIterator[Service]:
    """Serves a model of `gguf_builder` on a free port. Afterwards every job must be gone and the ledger balance."""
    native = make_engine(_native, path, **engine_options)
    text = load_text(_native.GgufFile(str(path)), path)
    engine = AsyncEngine(native)
    engine.attach()
    info = native.model_info
    limits = Limits(32768, 64, 0, 2048, info.vocab_size, info.context_length, 16)
    facts = ModelFacts(info.name, info.quant_kind, text.kind, info.vocab_size, info.context_length, "cpu")
    state = WorkerState(serving=Serving(engine, text, limits, facts), phase=Phase.READY)
    with ThreadPoolExecutor(2) as pool:
        server = build_server(load_settings(settings or {}, environ={}), state, pool)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield Service(port, native, engine)
        await server.stop(None)
    assert await engine.wait_idle(30)
    settle(native)
    await engine.close()
    text.close()
