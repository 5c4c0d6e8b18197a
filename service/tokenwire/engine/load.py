"""From a model reference to a running engine and its tokenizer. Blocks for as long as it takes: run in a thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tokenwire import _native
from tokenwire.config import Settings
from tokenwire.engine.device import DeviceChoice, choose_device
from tokenwire.engine.grammars import CompilerFactory, find_grammar_compiler
from tokenwire.engine.native import NativeEngine
from tokenwire.errors import NoDeviceError, TokenwireError
from tokenwire.models import resolve
from tokenwire.text import TextPipeline, find_tokenizer_json, load_tokenizer

MIB = 2**20


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that computes.

    Attributes:
        max_token_bytes: length of the longest vocabulary entry.
        device: `cpu` or `cuda:N`.
        device_reason: why it serves.
        device_name: as its driver names it; empty for the CPU.
        sm: compute capability, major × 10 + minor; 0 for the CPU.
        cuda_runtime_version: such as `13.0`; empty for the CPU.
        sizes: what was chosen for the device, for the log.
        warnings: oddities of its files, for the log.
        grammar_compiler: makes what compiles response formats; None where the device or an installation has none.
    """

    native: NativeEngine
    text: TextPipeline
    name: str
    architecture: str
    quant_kind: str
    tokenizer_kind: str
    vocab_size: int
    context_length: int
    max_token_bytes: int
    device: str
    device_reason: str
    device_name: str
    sm: int
    cuda_runtime_version: str
    sizes: Mapping[str, int]
    warnings: tuple[str, ...]
    grammar_compiler: CompilerFactory | None = None


def load_model(settings: Settings, on_progress: Callable[[int], None]) -> LoadedModel:
    """Finds, reads, packs and starts the model that `settings.model` means.

    Args:
        on_progress: called with 0, 25, 50, 75, 100; raising abandons the load.

    Raises:
        NoDeviceError: the CUDA device that was asked for cannot be used.
        ModelSourceError: there is no such model here.
        TextError: its tokenizer is malformed or not supported.
        EngineError: the file is malformed or not supported.
        TokenwireError: INSUFFICIENT_VRAM, naming the file and the bytes required and available.
        Exception: whatever `on_progress` raised.
    """
    choice = choose_device(settings)
    path = resolve(settings.model)
    file = _native.GgufFile(str(path))
    tokenizer_json = Path(settings.tokenizer_json) if settings.tokenizer_json else find_tokenizer_json(file, path)
    # The tokenizer is read and becomes whole, and the chat template's renderer starts, while the weights are packed.
    with ThreadPoolExecutor(max_workers=1) as side:
        reading = side.submit(load_tokenizer, file, tokenizer_json, deferred=True)
        starting = side.submit(lambda: TextPipeline.from_tokenizer(reading.result(), file))

        def read_vocabulary() -> tuple[list[bytes], list[int]]:
            tokenizer = reading.result()
            return tokenizer.vocabulary(), tokenizer.stop_token_ids

        def watch(percent: int) -> None:
            if reading.done():
                reading.result()  # a model without a usable tokenizer need not be loaded
            on_progress(percent)

        try:
            engine, reason = _open_engine(file, read_vocabulary, settings, choice, watch)
        except BaseException:
            if starting.exception() is None:
                starting.result().close()
            raise
        try:
            text = starting.result()
        except BaseException:
            engine.stop()
            raise
    vocabulary = text.vocabulary()
    info, device, stats = engine.model_info, engine.device_info, engine.stats()
    context_length = info.context_length
    if settings.max_context_tokens:
        context_length = min(context_length, settings.max_context_tokens)
    return LoadedModel(
        native=engine,
        text=text,
        name=settings.model_name or info.name or path.stem,
        architecture=info.architecture,
        quant_kind=info.quant_kind,
        tokenizer_kind=text.kind,
        vocab_size=info.vocab_size,
        context_length=context_length,
        max_token_bytes=max(map(len, vocabulary), default=1),
        device=device.id,
        device_reason=reason,
        device_name=device.name,
        sm=device.sm,
        cuda_runtime_version=device.runtime_version,
        sizes={
            "kv_tokens": stats.total_blocks * stats.block_tokens,
            "max_batch_tokens": engine.options.max_batch_tokens,
            "max_running_jobs": engine.options.max_running_jobs,
            "weight_bytes": stats.weight_bytes,
            "kv_bytes": stats.kv_bytes,
            "workspace_bytes": stats.workspace_bytes,
        },
        warnings=text.warnings,
        grammar_compiler=(find_grammar_compiler(vocabulary, text.stop_token_ids) if engine.supports_grammars else None),
    )


def _open_engine(
    file: _native.GgufFile,
    read_vocabulary: Callable[[], tuple[list[bytes], list[int]]],
    settings: Settings,
    choice: DeviceChoice,
    on_progress: Callable[[int], None],
) -> tuple[_native.Engine, str]:
    """The engine on the chosen device, or on the CPU where that is allowed; and why it is there."""

    def open_on(device: str) -> _native.Engine:
        return _native.Engine.load_beside(file, read_vocabulary, engine_options(settings, device), on_progress)

    try:
        return open_on(choice.device), choice.reason
    except _native.EngineError as error:
        if error.code == "INSUFFICIENT_VRAM":
            remedy = "; `--device cpu` computes in main memory" if choice.device != "cpu" else ""
            raise TokenwireError("INSUFFICIENT_VRAM", f"{error} (model {file.path}){remedy}") from error
        # Only a device can be unavailable: nothing was loaded yet.
        if error.code != "UNAVAILABLE":
            raise
        if not choice.may_fall_back:
            raise NoDeviceError(str(error)) from error
        return open_on("cpu"), f"CUDA is not usable: {error}"


def engine_options(settings: Settings, device: str = "cpu") -> _native.EngineOptions:
    options = _native.EngineOptions()
    options.device = device
    options.num_threads = settings.num_threads
    options.compute_nice = settings.compute_nice
    options.kv_cache_bytes = settings.kv_cache_size_mb * MIB
    options.max_context_tokens = settings.max_context_tokens
    options.max_batch_tokens = settings.max_batch_tokens
    options.max_running_jobs = settings.max_running_jobs
    options.max_queued_jobs = settings.max_queued_jobs
    options.max_queued_tokens = settings.max_queued_tokens
    options.batch_window_ms = settings.batch_window_ms
    options.prefix_cache = settings.prefix_cache
    options.max_undelivered_tokens = settings.max_undelivered_tokens
    options.slow_reader_timeout_ms = settings.slow_reader_timeout_ms
    options.faults = settings.fault_injection
    return options
