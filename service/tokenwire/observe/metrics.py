"""Every metric, declared once: name, kind, meaning, labels with all their values, buckets, and who counts it.

Label values come from closed sets, so that no request can add a series. docs/metrics.md shows this table, and a test
keeps the two equal. `observe/collect.py` fills it: the worker counts requests where they end, and what the engine
counts is read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tokenwire.errors import ERRORS

PREFIX = "tokenwire_"

OK = "OK"
DISCONNECTED = "DISCONNECTED"
CODES = (OK, *ERRORS, DISCONNECTED)

OTHER_METHOD = "other"
METHODS = (
    "Execute",
    "Attach",
    "Cancel",
    "Health",
    "Check",
    "Watch",
    "ServerReflectionInfo",
    "Drain",
    "Undrain",
    "Shutdown",
    "GetBatchWindow",
    "SetBatchWindow",
    "ListCache",
    "ClearCache",
    "GetConfig",
    OTHER_METHOD,
)
PHASES = ("loading", "ready", "draining", "failed")

# Upper bounds, seconds. A short answer of a small model takes a tenth of a second, the longest job 300 s by default.
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# From a cached prompt on a GPU, a few milliseconds, to a full context on a CPU.
_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_SWAP_BUCKETS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120)
_PERSIST_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


@dataclass(frozen=True, slots=True)
class Declaration:
    """One metric.

    Attributes:
        name: as scraped; a counter ends in `_total`, a unit stands at the end.
        labels: each label with every value it can take. Empty for one that the configuration fixes, such as a model's
            name: it has one value a process.
        buckets: upper bounds of a histogram; empty for one that the engine counts, which brings its own.
        counted_by: `worker` where a request ends; `engine` in the token loop, read when scraped; `state` is what is
            true when scraped; `gateway` at the HTTP port.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    counted_by: Literal["worker", "engine", "state", "gateway"]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


REQUEST_TOTAL = Declaration(
    PREFIX + "request_total",
    "counter",
    "Calls that ended, by method and code: OK, a code of docs/errors.md, or DISCONNECTED for a client that left.",
    "worker",
    {"method": METHODS, "code": CODES},
)
REQUEST_DURATION = Declaration(
    PREFIX + "request_duration_seconds",
    "histogram",
    "Jobs from the arrival of their Execute call to the end of its stream; a refused call is no job.",
    "worker",
    {"outcome": ("ok", "error", "cancelled")},
    _REQUEST_BUCKETS,
)
TIME_TO_FIRST_TOKEN = Declaration(
    PREFIX + "time_to_first_token_seconds",
    "histogram",
    "From submission to the engine until the first token was sampled, as `metrics.first_token_ms` says it. `warm` had a"
    " part of its prompt in the prefix cache.",
    "worker",
    {"cache": ("cold", "warm")},
    _FIRST_TOKEN_BUCKETS,
)
INTER_TOKEN_LATENCY = Declaration(
    PREFIX + "inter_token_latency_seconds", "histogram", "Between two tokens of a job, in the engine.", "engine"
)
CANCEL_LATENCY = Declaration(
    PREFIX + "cancel_latency_seconds",
    "histogram",
    "From a cancel, or a client leaving, until the job's KV blocks were free.",
    "engine",
)
BATCH_SIZE = Declaration(PREFIX + "batch_size", "histogram", "Jobs computed in a step.", "engine")
TOKENS_GENERATED = Declaration(
    PREFIX + "tokens_generated_total",
    "counter",
    "Tokens generated, the warm-up's included; an end-of-generation token is not counted.",
    "engine",
)
PROMPT_TOKENS = Declaration(
    PREFIX + "prompt_tokens_total",
    "counter",
    "Prompt tokens of admitted jobs, by whether they were computed or found in the prefix cache.",
    "engine",
    {"source": ("computed", "cached")},
)
TOKENS_PER_SECOND = Declaration(
    PREFIX + "tokens_per_second", "gauge", "Tokens generated a second over the last ten seconds.", "engine"
)
CACHE_HIT = Declaration(
    PREFIX + "cache_hit_total",
    "counter",
    "Admitted jobs that found a part of their prompt in the cache, by the tier that had it.",
    "engine",
    {"tier": ("device",)},
)
CACHE_MISS = Declaration(
    PREFIX + "cache_miss_total", "counter", "Admitted jobs that found nothing in the prefix cache.", "engine"
)
EVICTION = Declaration(
    PREFIX + "eviction_total",
    "counter",
    "Cached KV blocks given up for new content, by tier.",
    "engine",
    {"tier": ("device",)},
)
PREEMPTION = Declaration(
    PREFIX + "preemption_total", "counter", "Jobs that gave their blocks back and computed them again.", "engine"
)
QUEUE_DEPTH = Declaration(PREFIX + "request_queue_depth", "gauge", "Jobs waiting for admission.", "state")
REQUESTS_ACTIVE = Declaration(PREFIX + "requests_active", "gauge", "Jobs that hold KV blocks.", "state")
POOL_UTILIZATION = Declaration(
    PREFIX + "pool_utilization_ratio", "gauge", "Share of the KV pool's blocks that live jobs hold, 0 to 1.", "state"
)
KV_BLOCKS = Declaration(
    PREFIX + "kv_blocks",
    "gauge",
    "Blocks of the KV pool, by state; the three add up to the pool.",
    "state",
    {"state": ("free", "used", "cached")},
)
MEMORY_USED = Declaration(
    PREFIX + "memory_used_bytes",
    "gauge",
    "Memory that the engine holds, wherever it computes, by purpose.",
    "state",
    {"kind": ("weights", "kv", "workspace")},
)
VRAM = Declaration(
    PREFIX + "worker_vram_bytes", "gauge", "Device memory that the engine holds; 0 when it computes on a CPU.", "state"
)
AGENTS_ACTIVE = Declaration(
    PREFIX + "agents_active", "gauge", "Named sessions on the device. Stays 0: this version has none.", "state"
)
DETACHED_JOBS = Declaration(
    PREFIX + "detached_jobs", "gauge", "Detached jobs that can be attached to, running or ended.", "state"
)
DETACHED_BYTES = Declaration(
    PREFIX + "detached_bytes", "gauge", "Memory that the kept events of detached jobs take.", "state"
)
UPTIME = Declaration(PREFIX + "worker_uptime_seconds", "gauge", "Since the process started.", "state")
PHASE = Declaration(
    PREFIX + "worker_phase", "gauge", "1 for the phase that the worker is in, 0 for the others.", "state",
    {"phase": PHASES},
)  # fmt: skip
READY = Declaration(
    PREFIX + "worker_ready", "gauge", "1 while readiness is SERVING: the worker should get more work.", "state"
)
LOAD = Declaration(PREFIX + "worker_load_ratio", "gauge", "Progress of loading the model, 0 to 1.", "state")
INFO = Declaration(
    PREFIX + "worker_info",
    "gauge",
    "Always 1; its labels say what runs here.",
    "state",
    {"version": (), "model": (), "device": (), "quant_kind": ()},
)
MODEL_SWAP = Declaration(
    PREFIX + "model_swap_duration_seconds",
    "histogram",
    "Changes of the serving model, by how they ended. Stays 0: this version serves one model for its life.",
    "worker",
    {"outcome": ("success", "failure")},
    _SWAP_BUCKETS,
)
CACHE_PERSIST = Declaration(
    PREFIX + "cache_persist_duration_seconds",
    "histogram",
    "Writing one session's KV to disk. Stays 0: this version has no named sessions.",
    "worker",
    {},
    _PERSIST_BUCKETS,
)
LOG_LINES_DROPPED = Declaration(
    PREFIX + "log_lines_dropped_total", "counter", "Log lines lost because the log file could not take them.", "state"
)

GATEWAY_WORKERS = Declaration(
    PREFIX + "gateway_workers",
    "gauge",
    "Workers behind a gateway that runs apart from them, by what they last said. Only on that gateway's page.",
    "gateway",
    {"state": ("ready", "not_ready", "unreachable")},
)

GATEWAY_UNKNOWN_FIELDS = Declaration(
    PREFIX + "gateway_unknown_fields_total",
    "counter",
    "Fields of unknown names in HTTP requests, which were ignored. Where there is an HTTP port.",
    "gateway",
)

# What routers of the Gateway API read from a model server that has no label of its own. Names and labels are vLLM's.
VLLM_WAITING = Declaration(
    "vllm:num_requests_waiting", "gauge", "As tokenwire_request_queue_depth.", "state", {"model_name": ()}
)
VLLM_RUNNING = Declaration(
    "vllm:num_requests_running", "gauge", "As tokenwire_requests_active.", "state", {"model_name": ()}
)
VLLM_KV_USAGE = Declaration(
    "vllm:kv_cache_usage_perc", "gauge", "As tokenwire_pool_utilization_ratio.", "state", {"model_name": ()}
)
VLLM_CACHE_CONFIG = Declaration(
    "vllm:cache_config_info",
    "gauge",
    "Always 1; its labels say how many tokens a KV block holds and how many blocks there are.",
    "state",
    {"model_name": (), "block_size": (), "num_gpu_blocks": ()},
)
VLLM_LORA = Declaration(
    "vllm:lora_requests_info",
    "gauge",
    "When it was last true, Unix seconds: this worker serves no adapters.",
    "state",
    {"max_lora": ("0",), "running_lora_adapters": ("",), "waiting_lora_adapters": ("",)},
)

DECLARATIONS = tuple(value for value in tuple(globals().values()) if isinstance(value, Declaration))

_INTRODUCTION = """# Metrics

Written by `python -m tokenwire.observe.metrics` from the declarations in `service/tokenwire/observe/metrics.py`; do not
edit. Where to scrape them, and what they cost, is in [operations.md](operations.md).

No label takes a value from a request: every label below shows all its values, or is fixed by the configuration. Gauges
are read when scraped. What the engine counts, it counts in its own loop; a scrape reads a copy and waits for no step.
"""


def markdown() -> str:
    """docs/metrics.md."""
    lines = [_INTRODUCTION, "| Metric | Kind | Labels | Meaning |", "|---|---|---|---|"]
    for item in DECLARATIONS:
        labels = "<br>".join(
            f"`{name}`: {', '.join(f'`{value}`' for value in values if value) or 'fixed'}"
            for name, values in item.labels.items()
        )
        lines.append(f"| `{item.name}` | {item.kind} | {labels} | {item.help} |")
    lines += ["", "Buckets, upper bounds:", "", "| Histogram | Bounds |", "|---|---|"]
    for item in DECLARATIONS:
        if item.kind == "histogram":
            bounds = " ".join(f"{bound:g}" for bound in item.buckets) or "the engine's: `native/engine/telemetry.h`"
            lines.append(f"| `{item.name}` | {bounds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
