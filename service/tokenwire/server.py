"""The life of the worker: bind, load, warm, serve, drain, exit.

What runs where: the event loop owns the server, the state and every stream; one thread loads the model; the tokenizer
threads encode prompts; the engine's own thread computes and is never waited for on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from tokenwire._version import __version__
from tokenwire.config import Settings
from tokenwire.engine import AsyncEngine, JobSpec
from tokenwire.engine.async_engine import EngineFailure, watch_engine
from tokenwire.engine.grammars import Grammars
from tokenwire.errors import NoDeviceError, TokenwireError
from tokenwire.observe.log_file import flush_log_files, open_log_file, reopen_log_files
from tokenwire.observe.logging import bind_context, configure_logging, get_logger
from tokenwire.observe.tracing import TracingError, build_tracer
from tokenwire.ports import Ports
from tokenwire.rpc.admin import Control
from tokenwire.rpc.listen import CannotBindError
from tokenwire.rpc.server import build_server
from tokenwire.rpc.state import ModelFacts, Phase, Serving, WorkerState
from tokenwire.rpc.validate import Limits
from tokenwire.security.key_file import KeyFileError
from tokenwire.security.setup import build_security
from tokenwire.security.tls import TlsError

if TYPE_CHECKING:
    from tokenwire.engine.load import LoadedModel

T = TypeVar("T")

EXIT_OK = 0
EXIT_START_FAILED = 1
EXIT_NO_DEVICE = 69
EXIT_ENGINE_FAILED = 70
EXIT_CANNOT_BIND = 71
EXIT_CONFIG = 78

# New objects between two looks for cycles among them; Python's own choice is 700.
GC_ALLOCATIONS = 20_000

# How long ended streams have to carry their last event away, and a dead engine's thread to stop, seconds.
FLUSH_SECONDS = 2.0
STOP_SECONDS = 5.0

ProgressCallback = Callable[[int], None]
Loader = Callable[[Settings, ProgressCallback], "LoadedModel"]
Die = Callable[[int], object]


class StartError(Exception):
    """The worker cannot start. `str()` is one line for a person."""

    def __init__(self, exit_status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.code = code


class _AbandonedError(Exception):
    """Raised inside the loader when the process was told to stop."""


class StopSignals:
    """SIGTERM and SIGINT, counted: the first drains, the second ends the drain, a third ends the process."""

    def __init__(self, die: Die) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._die = die

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.receive)

    def receive(self) -> None:
        if self.second.is_set():
            self._die(EXIT_START_FAILED)
        elif self.first.is_set():
            self.second.set()
        else:
            self.first.set()


def run(settings: Settings) -> int:
    """Serves until a signal or a failure; returns the process's exit status. Needs the main thread."""
    # The engine is compiled: whoever only reads this module, or brings a loader of their own, does not need it.
    from tokenwire.engine.load import load_model

    # gRPC's own lines on stderr are no JSON, and say nothing that a status or an event of ours does not.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    configure_logging(settings.log_level, settings.log_format)
    if settings.log_file:
        try:
            log_file = open_log_file(settings)
        except OSError as error:
            message = f"log_file ({settings.log_file}): cannot be written: {error.strerror}"
            get_logger().error("error", code="CONFIG", message=message)
            return EXIT_CONFIG
        configure_logging(settings.log_level, settings.log_format, log_file=log_file)
    return run_loop(serve(settings, load_model))


def end_now(exit_status: int) -> None:
    """Ends the process without cleaning up, but for what it logged."""
    flush_log_files()
    os._exit(exit_status)


async def serve(settings: Settings, load: Loader, die: Die = end_now) -> int:
    """The worker's life on a running loop.

    Args:
        load: makes the model; runs in a thread of its own.
        die: ends the process at once, without cleaning up; used when a thread can no longer be joined.
    """
    log = get_logger()
    loop = asyncio.get_running_loop()
    began = loop.time()
    bind_context(worker_id=settings.worker_id or f"{socket.gethostname()}-{os.getpid()}")
    log.info("startup", version=__version__, model=settings.model, device=settings.device)
    if settings.fault_injection:
        log.warning("fault_injection", faults=settings.fault_injection)
    signals = StopSignals(die)
    signals.install()
    state = WorkerState(
        model=settings.model_name or Path(settings.model).stem,
        device=settings.cuda_device or "cpu",
        liveness_s=settings.liveness_seconds,
    )

    with ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenizer") as pool:
        try:
            security = build_security(settings)
            state.tracer = build_tracer(settings)
        except (KeyFileError, TlsError, TracingError) as error:  # files were right when the settings were read
            log.error("error", code="CONFIG", message=str(error))
            return EXIT_CONFIG
        loop.add_signal_handler(signal.SIGHUP, security.reload)
        loop.add_signal_handler(signal.SIGUSR1, reopen_log_files)
        server = build_server(settings, state, pool, security.guard)
        ports = Ports(settings, security)
        try:
            port = await ports.open_grpc("grpc", server, settings.host, settings.port)
            ports.open_probes(state)
            control = Control(stop=signals.first.set, is_stopping=signals.first.is_set)
            await ports.open_admin(state, control)
            await ports.open_http(port, state, control)
            log.info("listening", host=settings.host, port=port, **ports.others(), **security.describe())
            security.warn_if_plain(settings.allow_remote)
            model = await _load_model(settings, load, state, signals, die)
            if model is None:
                log.info("shutdown", during="loading")
                return EXIT_OK
            bind_context(model=model.name, device=model.device)
            engine = AsyncEngine(model.native)
            engine.attach()
            await _warm(engine, model)
            state.serving = _serving(settings, engine, model)
            # What there is now stays: collections need not look at it, and what calls leave behind is seldom a cycle.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_ALLOCATIONS, *gc.get_threshold()[1:])
            state.enter(Phase.READY)
            log.info("ready", host=settings.host, port=port, seconds=round(loop.time() - began, 3), **ports.others())

            failure = await _until_drained(engine, state, settings, signals)
            if failure is not None:
                return await _fail(engine, state, server, model, failure, die)
            await ports.close_http(FLUSH_SECONDS)
            await server.stop(FLUSH_SECONDS)
            # stop() returns before the handlers' last lines ran; the engine must not go before they did.
            await engine.wait_idle(FLUSH_SECONDS)
            return await _close(engine, model, "serving", EXIT_OK, die)
        except (StartError, CannotBindError) as error:
            state.enter(Phase.FAILED)
            if isinstance(error, CannotBindError):
                error = StartError(EXIT_CANNOT_BIND, "CANNOT_BIND", str(error))
            log.error("error", code=error.code, message=str(error))
            return error.exit_status
        finally:
            await ports.close()
            if state.tracer is not None:
                await loop.run_in_executor(None, state.tracer.close)


async def _load_model(
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
    await _first_of(loading, signals.first.wait())
    if signals.first.is_set():
        abandoned.set()
        await _first_of(loading, signals.second.wait())
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


async def _warm(engine: AsyncEngine, model: LoadedModel) -> None:
    """Runs a short job, so that the first client does not pay for first uses, and a model that cannot compute shows."""
    prompt_ids = model.text.encode_prompt("Hello")
    with engine.open("tokenwire:warm-up") as stream:
        engine.start(stream, JobSpec("tokenwire:warm-up", model.name, prompt_ids, 2, seed=0, temperature=0.0))
        async for _ in stream:
            pass
        failure = stream.failure
    if failure is not None:
        raise StartError(EXIT_START_FAILED, failure.code, f"the model cannot compute: {failure.message}")


def _serving(settings: Settings, engine: AsyncEngine, model: LoadedModel) -> Serving:
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


async def _until_drained(
    engine: AsyncEngine, state: WorkerState, settings: Settings, signals: StopSignals
) -> EngineFailure | None:
    """Serves until a signal, then drains. Returns why the engine died, or None if it did not."""

    def report(foreign_memory: str) -> None:
        if foreign_memory and foreign_memory != state.foreign_memory:
            get_logger().critical("residency_violation", message=foreign_memory)
        state.note_residency(foreign_memory)

    checking = asyncio.ensure_future(engine.watch_residency(settings.residency_check_sec, report))
    watching = asyncio.ensure_future(watch_engine(engine, watchdog_s=settings.watchdog_seconds, on_look=state.refresh))
    try:
        await _first_of(watching, signals.first.wait())
        if not watching.done():
            await _first_of(watching, _drain(engine, state, settings, signals))
        return watching.result() if watching.done() else None
    finally:
        watching.cancel()
        checking.cancel()


async def _drain(engine: AsyncEngine, state: WorkerState, settings: Settings, signals: StopSignals) -> None:
    log = get_logger()
    state.enter(Phase.DRAINING)
    log.info("drain_start", live=engine.num_live, seconds=settings.drain_seconds)
    notice_ends_at = asyncio.get_running_loop().time() + settings.drain_notice_seconds
    left = await engine.drain(settings.drain_seconds, signals.second)
    # A call that meets a port which is about to close gets gRPC's CANCELLED: nobody retries that.
    remaining = notice_ends_at - asyncio.get_running_loop().time()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(signals.second.wait(), max(0.0, remaining))
    log.info("drain_end", unfinished=left, cut_short=signals.second.is_set())


async def _fail(
    engine: AsyncEngine,
    state: WorkerState,
    server: grpc.aio.Server,
    model: LoadedModel,
    failure: EngineFailure,
    die: Die,
) -> int:
    """Readiness off, a typed error to every stream, and out; nothing here waits for the engine without a bound."""
    code = failure.code or ("INTERNAL" if model.device == "cpu" else "CUDA_ERROR")
    state.enter(Phase.FAILED)
    get_logger().error("error", code=code, message=f"the engine failed: {failure.reason}", live=engine.num_live)
    engine.fail(lambda: TokenwireError(code))
    await engine.wait_idle(FLUSH_SECONDS)
    await server.stop(FLUSH_SECONDS)
    return await _close(engine, model, "failure", EXIT_ENGINE_FAILED, die)


async def _close(engine: AsyncEngine, model: LoadedModel, during: str, exit_status: int, die: Die) -> int:
    """Frees the device and says goodbye; a step that hangs does not keep the process."""
    closing = asyncio.ensure_future(engine.close())
    await asyncio.wait([closing], timeout=STOP_SECONDS)
    model.text.close()
    get_logger().info("shutdown", during=during, engine_stopped=closing.done())
    if not closing.done():
        die(EXIT_ENGINE_FAILED)
    return exit_status


async def _first_of(future: asyncio.Future[T], other: Coroutine[object, object, object]) -> None:
    """Waits until one of the two is done; `other` is cancelled if it is not."""
    waiting = asyncio.ensure_future(other)
    both: tuple[asyncio.Future[Any], ...] = (future, waiting)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def run_loop(main: Coroutine[object, object, int]) -> int:
    """Runs to the end on the fastest event loop there is."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
