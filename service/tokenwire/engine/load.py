"""From a model reference to a running engine and its tokenizer. Blocks for as long as it takes: run in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tokenwire import _native
from tokenwire.config import Settings
from tokenwire.engine.native import NativeEngine
from tokenwire.errors import NoDeviceError
from tokenwire.models import resolve
from tokenwire.text import TextPipeline, find_tokenizer_json, load_tokenizer

MIB = 2**20


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that computes.

    Attributes:
        max_token_bytes: length of the longest vocabulary entry.
        device: `cpu` or `cuda:N`.
        warnings: oddities of its files, for the log.
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
    weight_bytes: int
    device: str
    warnings: tuple[str, ...]


def load_model(settings: Settings, on_progress: Callable[[int], None]) -> LoadedModel:
    """Finds, reads, packs and starts the model that `settings.model` means.

    Args:
        on_progress: called with 0, 25, 50, 75, 100; raising abandons the load.

    Raises:
        NoDeviceError: a CUDA device was asked for, and this engine cannot use it.
        ModelSourceError: there is no such model here.
        TextError: its tokenizer is malformed or not supported.
        EngineError: the file is malformed or not supported, or does not fit.
        Exception: whatever `on_progress` raised.
    """
    if settings.cuda_device is not None:
        raise NoDeviceError(f"device {settings.cuda_device} is not usable: {_native.cuda_status()}")
    path = resolve(settings.model)
    file = _native.GgufFile(str(path))
    tokenizer_json = Path(settings.tokenizer_json) if settings.tokenizer_json else find_tokenizer_json(file, path)
    tokenizer = load_tokenizer(file, tokenizer_json)
    vocabulary = tokenizer.vocabulary()
    # The chat template's renderer starts while the weights are packed.
    with ThreadPoolExecutor(max_workers=1) as side:
        starting = side.submit(TextPipeline.from_tokenizer, tokenizer, file)
        try:
            engine = _native.Engine(file, vocabulary, tokenizer.stop_token_ids, engine_options(settings), on_progress)
        except BaseException:
            starting.result().close()
            raise
        text = starting.result()
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
        warnings=text.warnings,
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
