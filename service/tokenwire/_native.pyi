"""The compiled engine, implemented in native/bindings. It knows neither gRPC nor protobuf's Python runtime."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

class EngineError(Exception):
    """Raised by everything here. `code` is one of errors.py's codes, `str()` one line for a person."""

    code: str

def build_info() -> dict[str, str]:
    """`version`, `compiler`, `build_type`, `cuda` (`on` or `off`), `sanitizer`, `isas` (compiled in, space separated)."""

def cpu_isa() -> str:
    """The instruction set the CPU backend uses here: `avx512-vnni`, `avx2` or `portable`."""

def cuda_status() -> str:
    """`available`, or why not: `built without CUDA`, `no NVIDIA driver`, …"""

class CudaDevice:
    """A device as its driver describes it. `sm` is the compute capability, major × 10 + minor."""

    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def sm(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...

class CudaProbe:
    """What CUDA is here. `error` is empty if it can be used; versions read like `13.0` and are empty where unknown."""

    @property
    def error(self) -> str: ...
    @property
    def driver_version(self) -> str: ...
    @property
    def runtime_version(self) -> str: ...
    @property
    def devices(self) -> list[CudaDevice]: ...

def cuda_probe() -> CudaProbe:
    """Asks the driver; takes no device memory and creates no context."""

LEAST_SM: int
"""Compute capability, major × 10 + minor, that the CUDA backend has code for: this and newer."""

def open_cuda_device(device: int) -> None:
    """Makes this process's context on CUDA device `device`, or for -1 on the first that the backend has code for.

    An engine does it too; a start that calls this in a thread does other things meanwhile. Failures are the engine's.
    """

class HealthServer:
    """Answers `grpc.health.v1.Health` from a thread of its own, until `stop`.

    Args:
        listening: descriptors of listening sockets; owned from here on.
        services: the names that can be asked about; none serves before the first `publish`.
        most_streams: open at a time on one connection.
        most_header_bytes: of one call.
        idle_timeout_ms: of a connection on which nothing is watched.
        stale_after_ms: nothing serves when the last `publish` is longer ago.
    """

    def __init__(
        self,
        *,
        listening: Sequence[int],
        services: Sequence[str],
        most_streams: int,
        most_connections: int,
        most_header_bytes: int,
        handshake_timeout_ms: int,
        idle_timeout_ms: int,
        stale_after_ms: int,
    ) -> None: ...
    def publish(self, is_serving: Sequence[bool]) -> None:
        """Says what serves now, in the order of the services."""

    def stop(self) -> None:
        """Ends every connection and closes the sockets. Idempotent."""

    def take_endings(self) -> list[tuple[str, str, int]]:
        """Calls that ended since the last call of this: method, code, how many."""

class TensorInfo:
    """A tensor of a model file. `shape` is in GGUF order: the fastest-varying dimension first."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_bytes(self) -> int: ...

GgufValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

class GgufFile:
    """A GGUF v3 file, mapped and fully validated (W-40).

    Strings with invalid UTF-8 are returned with U+FFFD; `get_bytes` returns an array of strings exactly.

    Raises:
        EngineError: MODEL_LOAD_FAILED for a malformed or unreadable file, UNSUPPORTED_MODEL for a version or type that
            is not supported.
    """

    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    def keys(self) -> list[str]: ...
    def get(self, key: str) -> GgufValue | None:
        """The value of `key`, or None if the file has no such key."""
    def get_bytes(self, key: str) -> list[bytes] | None:
        """An array of strings as bytes, or None if the file has no such key."""
    def tensors(self) -> list[TensorInfo]: ...

class EngineOptions:
    """Settings of an engine. 0 means: choose for this machine or model. Every attribute can be assigned."""

    def __init__(self) -> None: ...
    device: str
    """`cpu` (the default), `cuda` or `cuda:N`."""
    num_threads: int
    compute_nice: int
    """How far the threads that compute on a CPU stand back behind others, 0-19; here 0 means not at all."""
    kv_cache_bytes: int
    max_context_tokens: int
    max_batch_tokens: int
    max_running_jobs: int
    max_queued_jobs: int
    max_queued_tokens: int
    batch_window_ms: int
    prefix_cache: bool
    run_ahead: bool
    """On a GPU: ask for a step before the draws of the one before are known."""
    max_undelivered_tokens: int
    slow_reader_timeout_ms: int
    faults: str
    """For tests: `kind@step` entries between commas; kinds are `oom`, `device-error` and `host-memory`."""

class DeviceInfo:
    """Where an engine computes."""

    @property
    def id(self) -> str:
        """`cpu` or `cuda:N`."""
    @property
    def name(self) -> str:
        """As its driver names it; empty for the CPU."""
    @property
    def sm(self) -> int:
        """Compute capability, major × 10 + minor; 0 for the CPU."""
    @property
    def runtime_version(self) -> str:
        """Of CUDA, such as `13.0`; empty for the CPU."""

class ModelInfo:
    @property
    def architecture(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def quant_kind(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def kv_bytes_per_token(self) -> int: ...

class Histogram:
    """Counts of observations: `counts[i]` of those above `bounds[i - 1]` and at most `bounds[i]`, the last those above."""

    @property
    def bounds(self) -> list[float]: ...
    @property
    def counts(self) -> list[int]: ...
    @property
    def sum(self) -> float: ...

class EngineStats:
    """A snapshot from memory; taking it never waits for a step."""

    @property
    def active_jobs(self) -> int: ...
    @property
    def queued_jobs(self) -> int: ...
    @property
    def total_blocks(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def used_blocks(self) -> int: ...
    @property
    def cached_blocks(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_generated_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_cache_hits(self) -> int:
        """First admissions that found a part of their prompt in the prefix cache."""
    @property
    def num_cache_misses(self) -> int:
        """First admissions that found nothing there; 0 while the cache is off."""
    @property
    def num_evictions(self) -> int:
        """Cached blocks given up for new content."""
    @property
    def last_batch_size(self) -> int: ...
    @property
    def inter_token_s(self) -> Histogram:
        """Between two generated tokens of a job, seconds."""
    @property
    def batch_size(self) -> Histogram:
        """Sequences in a step."""
    @property
    def cancel_s(self) -> Histogram:
        """From a cancel to the job's blocks being free, seconds."""
    @property
    def tokens_per_second(self) -> float:
        """Generated over the last ten seconds."""
    @property
    def heartbeat_age_ms(self) -> float:
        """Milliseconds since the engine thread last showed life; large only if a step hangs."""
    @property
    def weight_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def num_out_of_memory(self) -> int:
        """Jobs that ended because a step had no memory for them."""
    @property
    def failure(self) -> str:
        """Why the engine thread died; empty while it lives."""
    @property
    def failure_code(self) -> str:
        """One of errors.py's codes; empty while it lives."""

class Outcome:
    """How a job ended. `error_code` is empty for a completed job, else one of errors.py's codes."""

    @property
    def error_code(self) -> str: ...
    @property
    def error_message(self) -> str: ...
    @property
    def stop_reason(self) -> Literal["", "eos", "max_tokens", "stop_sequence"]: ...
    @property
    def stop_sequence(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def tokens_in(self) -> int: ...
    @property
    def tokens_out(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def queue_ms(self) -> float: ...
    @property
    def prefill_ms(self) -> float: ...
    @property
    def first_token_ms(self) -> float: ...
    @property
    def decode_ms(self) -> float: ...
    @property
    def cache_lookup_ms(self) -> float:
        """Planning the step that admitted the job, in which its prefix was looked up."""

class Job:
    """One submitted generation. Its output waits in the engine until it is taken."""

    @property
    def handle(self) -> int:
        """Names the job in `Engine.take_ready`; never reused."""
    def take(self) -> tuple[list[bytes], Outcome | None]:
        """Everything that waits, as serialised `tokenwire.v1.ExecuteEvent` messages, and the outcome once there is one.

        Waiting tokens travel in one `token` event, unless the job asked for separate ones. With the outcome comes the `metrics` event, and for a completed job
        the `end` event, as the last messages; for a failed one the `error` event is the caller's to build. Once the
        outcome was returned, further calls return `([], None)`.
        """
    def cancel(self) -> int:
        """Stops the job: from now on `take` returns no token event. Returns the tokens generated so far."""
    @property
    def num_tokens_out(self) -> int: ...

class Grammar:
    """A compiled grammar, for any number of jobs of the engine whose vocabulary it was compiled for."""

class GrammarCompiler:
    """Compiles grammars with the llguidance library.

    Args:
        library: a file that exports llguidance's C interface.
        vocabulary, stop_token_ids: as the engine has them.

    Raises:
        EngineError: UNAVAILABLE if the library cannot be used.
    """

    def __init__(self, library: str, vocabulary: Sequence[bytes], stop_token_ids: Sequence[int]) -> None: ...
    @property
    def version(self) -> str: ...
    def compile(self, kind: str, text: str) -> Grammar:
        """Compiles a `json_schema` or a `regex`.

        Raises:
            EngineError: INVALID_REQUEST, with one line for the grammar's author.
        """

class Engine:
    """Loads a model and runs the token loop on its own thread.

    Args:
        file: the model.
        vocabulary: the bytes each token id stands for in text; empty for control tokens.
        stop_token_ids: end-of-generation tokens.
        options: settings.
        on_progress: called with 0, 25, 50, 75, 100 while weights are packed; it may raise to abandon the load.

    Raises:
        EngineError: MODEL_LOAD_FAILED, UNSUPPORTED_MODEL, or INSUFFICIENT_VRAM.
    """

    def __init__(
        self,
        file: GgufFile,
        vocabulary: Sequence[bytes],
        stop_token_ids: Sequence[int],
        options: EngineOptions,
        on_progress: Callable[[int], None] | None = None,
    ) -> None: ...
    @staticmethod
    def load_beside(
        file: GgufFile,
        read_vocabulary: Callable[[], tuple[list[bytes], list[int]]],
        options: EngineOptions,
        on_progress: Callable[[int], None] | None = None,
    ) -> Engine:
        """As the constructor, but asks for vocabulary and stop tokens when the weights are in place.

        What `read_vocabulary` raises ends the load.
        """

    @property
    def model_info(self) -> ModelInfo: ...
    @property
    def device_info(self) -> DeviceInfo: ...
    @property
    def options(self) -> EngineOptions:
        """Those it was given, with every 0 replaced by what was chosen."""
    @property
    def supports_grammars(self) -> bool:
        """Whether jobs on this device may have a grammar."""
    @property
    def event_fd(self) -> int:
        """Becomes readable when at least one job has output; `take_ready` clears it. At most one wake-up a step."""
    def submit(
        self,
        *,
        job_id: str,
        model: str,
        prompt_ids: Sequence[int],
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        min_p: float,
        repetition_penalty: float,
        frequency_penalty: float,
        presence_penalty: float,
        logit_bias: Mapping[int, float],
        logprobs: int,
        stop: Sequence[bytes],
        seed: int,
        timeout_ms: int,
        cache_salt: bytes,
        separate_events: bool = False,
        priority: int = 0,
        grammar: Grammar | None = None,
    ) -> Job:
        """Queues a job. Its first event is `started`.

        Args:
            model: the name to report in `started`.
            max_tokens: already capped to what the context leaves.
            logprobs: alternatives a token, or -1 for no log-probabilities.
            timeout_ms: from now to INFERENCE_TIMEOUT; 0 for none.
            cache_salt: prefix-cache entries are shared only between jobs of the same salt.
            separate_events: tokens that were ready at different times are never merged into one event, so that where
                events begin and end depends on the request alone.
            priority: its class; higher ones are admitted first.
            grammar: what the answer must be.

        Raises:
            EngineError: OVERLOADED, KV_CAPACITY, CONTEXT_LENGTH_EXCEEDED, INVALID_REQUEST, or UNAVAILABLE once stopped.
        """
    def take_ready(self) -> list[int]:
        """Handles of the jobs with output that were not reported since their last `take`."""
    def fail_all(self, code: str, message: str) -> int:
        """Ends every job with this error; returns how many there were."""
    def stats(self) -> EngineStats: ...
    def audit(self) -> str:
        """Checks `free + used + cached = total` and every reference count; empty if the ledger balances."""
    def check_residency(self) -> str:
        """Empty if all that the device computes from lies in its own memory, else what does not. Asks the driver."""
    def cache_contents(self) -> dict[bytes, tuple[int, int]]:
        """By cache salt: findable blocks that nobody holds, and those that live jobs hold. Waits for a step."""
    def clear_cache(self) -> int:
        """Gives up every cached block; returns how many. Waits for a step."""
    batch_window_ms: int
    """How long an idle engine waits for company before a first step; a change takes effect with the next one."""
    def inject_stall(self, milliseconds: int) -> None:
        """Holds the engine thread up as a step that hangs would, for tests of what watches it."""
    def stop(self) -> None:
        """Ends the engine thread after its current step; remaining jobs end with UNAVAILABLE. Idempotent."""

class Runner:
    """The model without the loop, for tests and benchmarks: feeds tokens of independent sequences, returns logits."""

    def __init__(self, file: GgufFile, options: EngineOptions) -> None: ...
    @property
    def model_info(self) -> ModelInfo: ...
    def forward(self, sequence: int, token_ids: Sequence[int], all_logits: bool = False) -> bytes:
        """Appends tokens to a sequence; returns float32 logits, `[len(token_ids) or 1, vocab_size]`, row-major."""
    def forward_batch(self, sequences: Sequence[int], token_ids: Sequence[int]) -> bytes:
        """Appends one token to each sequence in one step; returns float32 logits, `[len(sequences), vocab_size]`."""
    def reset(self) -> None:
        """Forgets every sequence."""
    def profile(self) -> dict[str, tuple[int, float, int]]:
        """For each operation since the last `reset_profile`: calls, seconds, bytes of weights and KV it had to read."""
    def reset_profile(self) -> None: ...
