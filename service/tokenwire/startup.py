"""From settings to a model that serves: loaded beside a port that answers, warmed, and told to the handlers."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from tokenwire.config import Settings
from tokenwire.engine import AsyncEngine, JobSpec
from tokenwire.engine.grammars import Grammars
from tokenwire.errors import NoDeviceError, TokenwireError
from tokenwire.observe.logging import get_logger
from tokenwire.process import EXIT_NO_DEVICE, EXIT_OK, EXIT_START_FAILED, Die, StopSignals, first_of
from tokenwire.rpc.state import ModelFacts, Serving, WorkerState
from tokenwire.rpc.validate import Limits

if TYPE_CHECKING:
    from tokenwire.engine.load import LoadedModel

ProgressCallback = Callable[[int], None]
Loader = Callable[[Settings, ProgressCallback], "LoadedModel"]


class StartError(Exception):
    """The worker cannot start. `str()` is one line for a person."""

    def __init__(self, exit_status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.code = code


class _AbandonedError(Exception):
    """Raised inside the loader when the process was told to stop."""


async def load_in_thread(
    settings: Settings, load: Loader, state: WorkerState, signals: StopSignals, die: Die
) -> LoadedModel | None:
    """Loads in a thread while Health answers. None if a signal came first."""
    loop = asyncio.get_running_loop()
    abandoned = threading.Event()
    log = get_logger()

    def show(percent: int) -> None:
        state.load_percent = percent
        log.info("model_load_progress", percent=percent)

    # The loading thread has no context of its own, and its lines should name the worker too.
    context = contextvars.copy_context()

    def on_progress(percent: int) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        loop.call_soon_threadsafe(show, percent, context=context)

    log.info("model_load_start", model=settings.model)
    began = loop.time()
    loading = loop.run_in_executor(None, load, settings, on_progress)
    await first_of(loading, signals.first.wait())
    if signals.first.is_set():
        abandoned.set()
        await first_of(loading, signals.second.wait())
        if not loading.done():
            die(EXIT_OK)
    try:
        model = await loading
    except _AbandonedError:
        return None
    except TokenwireError as error:
        raise StartError(EXIT_START_FAILED, error.code, error.message) from error
    except Exception as error:
        status = EXIT_NO_DEVICE if isinstance(error, NoDeviceError) else EXIT_START_FAILED
        code = str(getattr(error, "code", "MODEL_LOAD_FAILED"))
        message = " ".join(str(error).split()) or type(error).__name__
        raise StartError(status, code, message) from error
    if abandoned.is_set():
        await loop.run_in_executor(None, model.native.stop)
        model.text.close()
        return None
    log.info(
        "model_load_complete",
        model=model.name,
        architecture=model.architecture,
        quant_kind=model.quant_kind,
        device=model.device,
        device_name=model.device_name,
        device_reason=model.device_reason,
        context_length=model.context_length,
        **model.sizes,
        seconds=round(loop.time() - began, 3),
    )
    for warning in model.warnings:
        log.warning("model_warning", message=warning)
    return model


async def warm_up(engine: AsyncEngine, model: LoadedModel) -> None:
    """Runs a short job, so that the first client does not pay for first uses, and a model that cannot compute shows."""
    prompt_ids = model.text.encode_prompt("Hello")
    with engine.open("tokenwire:warm-up") as stream:
        engine.start(stream, JobSpec("tokenwire:warm-up", model.name, prompt_ids, 2, seed=0, temperature=0.0))
        async for _ in stream:
            pass
        failure = stream.failure
    if failure is not None:
        raise StartError(EXIT_START_FAILED, failure.code, f"the model cannot compute: {failure.message}")


def serving_with(settings: Settings, engine: AsyncEngine, model: LoadedModel) -> Serving:
    limits = Limits(
        max_prompt_chars=settings.max_prompt_chars,
        max_chat_messages=settings.max_chat_messages,
        max_tokens_in=settings.max_tokens_in,
        max_tokens_out=settings.max_tokens_out,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        max_token_bytes=model.max_token_bytes,
        max_grammar_bytes=settings.max_grammar_bytes,
    )
    facts = ModelFacts(
        name=model.name,
        quant_kind=model.quant_kind,
        tokenizer_kind=model.tokenizer_kind,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        device=model.device,
        device_name=model.device_name,
        sm=model.sm,
        cuda_runtime_version=model.cuda_runtime_version,
    )
    grammars = None
    if model.grammar_compiler is not None:
        grammars = Grammars(
            model.grammar_compiler,
            timeout_s=settings.grammar_timeout_ms / 1000,
            max_entries=settings.grammar_cache_entries,
        )
    return Serving(engine, model.text, limits, facts, grammars)
