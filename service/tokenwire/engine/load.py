"""From a model file to a running engine, its tokenizer and what clients are told about both. Blocks: run in a thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenwire import _native
from tokenwire.config import Settings
from tokenwire.engine.native import NativeEngine
from tokenwire.errors import NoDeviceError
from tokenwire.text import TextPipeline, load_text

MIB = 2**20


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that computes. `max_token_bytes` is the length of the longest vocabulary entry."""

    native: NativeEngine
    text: TextPipeline
    name: str
    architecture: str
    quant_kind: str
    tokenizer_kind: str
    vocab_size: int
    context_length: int
    max_token_bytes: int
    weight_bytes: int
    device: str


def load_model(settings: Settings, path: Path, on_progress: Callable[[int], None]) -> LoadedModel:
    """Reads, packs and starts a model.

    Args:
        path: the GGUF file.
        on_progress: called with 0, 25, 50, 75, 100; raising abandons the load.

    Raises:
        NoDeviceError: a CUDA device was asked for, and this engine cannot use it.
        EngineError: the file is malformed or not supported, or does not fit.
        Exception: whatever `on_progress` raised, or the tokenizer of the file is not usable.
    """
    if settings.cuda_device is not None:
        raise NoDeviceError(f"device {settings.cuda_device} is not usable: {_native.cuda_status()}")
    file = _native.GgufFile(str(path))
    text = load_text(file, path)
    vocabulary = text.vocabulary()
    engine = _native.Engine(file, vocabulary, text.stop_token_ids, engine_options(settings), on_progress)
    info = engine.model_info
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
        weight_bytes=info.weight_bytes,
        device="cpu",
    )


def engine_options(settings: Settings) -> _native.EngineOptions:
    options = _native.EngineOptions()
    options.num_threads = settings.num_threads
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
    return options
