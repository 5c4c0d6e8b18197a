"""The life of the worker: bind, load, warm, serve, drain, exit. startup.py has what it loads and warms with.

What runs where: the event loop owns the server, the state and every stream; one thread loads the model; the tokenizer
threads encode prompts; the engine's own thread computes and is never waited for on the loop; that of the health port
answers probes.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from tokenwire._version import __version__
from tokenwire.config import Settings
from tokenwire.engine import AsyncEngine
from tokenwire.engine.async_engine import EngineFailure, watch_engine
from tokenwire.errors import TokenwireError
from tokenwire.observe.log_file import open_log_file, reopen_log_files
from tokenwire.observe.logging import bind_context, configure_logging, get_logger
from tokenwire.observe.tracing import TracingError, build_tracer
from tokenwire.ports import Ports
from tokenwire.process import (
    EXIT_CANNOT_BIND,
    EXIT_CONFIG,
    EXIT_ENGINE_FAILED,
    EXIT_OK,
    Die,
    StopSignals,
    end_now,
    first_of,
    run_loop,
)
from tokenwire.rpc.admin import Control
from tokenwire.rpc.listen import CannotBindError
from tokenwire.rpc.server import build_server
from tokenwire.rpc.state import Phase, WorkerState
from tokenwire.security.key_file import KeyFileError
from tokenwire.security.setup import build_security
from tokenwire.security.tls import TlsError
from tokenwire.startup import Loader, StartError, load_in_thread, serving_with, warm_up
from tokenwire.waiting import wait_until

if TYPE_CHECKING:
    from tokenwire.engine.load import LoadedModel

# New objects between two looks for cycles among them; Python's own choice is 700.
GC_ALLOCATIONS = 20_000

# How long ended streams have to carry their last event away, and a dead engine's thread to stop, seconds.
FLUSH_SECONDS = 2.0
STOP_SECONDS = 5.0


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
            model = await load_in_thread(settings, load, state, signals, die)
            if model is None:
                log.info("shutdown", during="loading")
                return EXIT_OK
            bind_context(model=model.name, device=model.device)
            engine = AsyncEngine(model.native)
            engine.attach()
            await warm_up(engine, model)
            state.serving = serving_with(settings, engine, model)
            # What there is now stays: collections need not look at it, and what calls leave behind is seldom a cycle.
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_ALLOCATIONS, *gc.get_threshold()[1:])
            gc.enable()
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
            state.refusals.flush()
            if state.tracer is not None:
                await loop.run_in_executor(None, state.tracer.close)


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
        await first_of(watching, signals.first.wait())
        if not watching.done():
            await first_of(watching, _drain(engine, state, settings, signals))
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
    await wait_until(signals.second, max(0.0, remaining))
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
