"""Every setting of the worker, once: name with unit, default, bounds, help. config_sources.py reads them."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from tokenwire.http_config import HttpSettings, is_loopback


class Settings(HttpSettings):
    """All settings. Sizes of 0 let the engine choose for the machine and the model, where the help says so."""

    model: str = Field("", description="model to serve: a path, a manifest name or a reference")
    model_name: str = Field(
        "", max_length=128, pattern=r"^[A-Za-z0-9._:/-]*$", description="name reported to clients; default: the file's"
    )
    tokenizer_json: str = Field(
        "", description="tokenizer.json to use; default: the model file's own, else the one beside it"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", description="where to compute: auto, cpu, cuda or cuda:N"
    )
    gpu_device: int | None = Field(None, ge=0, le=255, description="CUDA device number, for `cuda` without `:N`")
    worker_id: str = Field(
        "", max_length=64, pattern=r"^[A-Za-z0-9._-]*$", description="names this worker in logs; default: host and pid"
    )

    host: str = Field("127.0.0.1", min_length=1, max_length=253, description="address to listen on")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="HTTP port of the Prometheus metrics; 0 takes a free one; unset: none"
    )
    health_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="gRPC port with health alone, never encrypted; 0 takes a free one; unset: none",
    )
    probe_host: str = Field("", max_length=253, description="address of the metrics and health ports; default: host")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="gRPC port of the AdminService; 0 takes a free one; unset: none"
    )
    admin_host: str = Field("127.0.0.1", min_length=1, max_length=253, description="address of the admin port")
    allow_remote: bool = Field(
        False, description="listen on other than loopback addresses; needs API keys or TLS client certificates"
    )

    requests_per_minute: int = Field(
        0, ge=0, le=10**9, description="most generations of one credential in any 60 seconds; 0: no limit"
    )
    tokens_per_minute: int = Field(
        0,
        ge=0,
        le=10**12,
        description="most tokens in and out of one credential in any 60 seconds; 0: no limit",
    )
    concurrent_requests: int = Field(
        0, ge=0, le=10**6, description="most generations of one credential open at one time; 0: no limit"
    )
    total_requests_per_minute: int = Field(
        0, ge=0, le=10**9, description="most generations of all together in any 60 seconds; 0: no limit"
    )
    total_tokens_per_minute: int = Field(
        0, ge=0, le=10**12, description="most tokens of all together in any 60 seconds; 0: no limit"
    )
    total_concurrent_requests: int = Field(
        0, ge=0, le=10**6, description="most generations of all together open at one time; 0: no limit"
    )

    max_tokens_in: int = Field(0, ge=0, le=2**20, description="most prompt tokens; 0: what the context holds")
    max_tokens_out: int = Field(2048, ge=1, le=2**20, description="most tokens that one request may generate")
    max_prompt_chars: int = Field(32768, ge=1, le=2**20, description="most characters in a text prompt or a chat")
    max_chat_messages: int = Field(1024, ge=1, le=2**16, description="most messages in a chat")
    inference_timeout_sec: float = Field(300.0, gt=0, le=86400, description="longest a job may take, seconds")

    num_threads: int = Field(0, ge=0, le=1024, description="threads that compute; 0: the machine's cores")
    compute_nice: int = Field(5, ge=0, le=19, description="how far CPU threads that compute stand back behind others")
    kv_cache_size_mb: int = Field(0, ge=0, le=2**24, description="memory for the KV pool, MiB; 0: choose")
    max_context_tokens: int = Field(0, ge=0, le=2**22, description="context length; 0: the model's")
    max_batch_tokens: int = Field(0, ge=0, le=2**20, description="most tokens computed in one step; 0: choose")
    max_running_jobs: int = Field(0, ge=0, le=2**16, description="most jobs computed together; 0: choose")
    max_queued_jobs: int = Field(0, ge=0, le=2**20, description="most jobs that may wait; 0: choose")
    max_queued_tokens: int = Field(0, ge=0, le=2**31 - 1, description="most prompt tokens that may wait; 0: choose")
    batch_window_ms: int = Field(0, ge=0, le=1000, description="how long to gather jobs before a step, milliseconds")
    prefix_cache: bool = Field(True, description="reuse the KV of prompts that begin alike")
    max_undelivered_tokens: int = Field(
        0, ge=0, le=2**20, description="tokens that may wait for a slow reader before its job pauses; 0: choose"
    )
    slow_reader_timeout_ms: int = Field(
        30_000, ge=0, le=86_400_000, description="how long a paused job waits for its reader, milliseconds"
    )

    resume_grace_seconds: float = Field(
        60.0, gt=0, le=86400, description="how long a detached job is kept with nobody reading it, seconds"
    )
    resume_job_bytes: int = Field(
        4 * 2**20, ge=65536, le=2**31, description="most that is kept of one detached job's events, bytes"
    )
    resume_total_bytes: int = Field(
        64 * 2**20, ge=65536, le=2**40, description="most that is kept of all detached jobs' events, bytes"
    )

    drain_seconds: float = Field(
        30.0, ge=0, le=3600, description="how long running jobs may finish at shutdown, seconds"
    )
    drain_notice_seconds: float = Field(
        0.0,
        ge=0,
        le=300,
        description="a drain keeps the port open for at least this long, refusing calls, until balancers know; seconds",
    )
    liveness_seconds: float = Field(
        30.0, ge=0.1, le=3600, description="a step that shows no life for this long fails the liveness probe, seconds"
    )
    watchdog_seconds: float = Field(
        60.0, ge=1, le=3600, description="a step that shows no life for this long counts as a failed device, seconds"
    )
    residency_check_sec: float = Field(
        60.0, gt=0, le=86400, description="how often a GPU's memory is checked to hold all it computes from, seconds"
    )
    fault_injection: str = Field(
        "",
        pattern=r"^((oom|device-error|host-memory)@\d{1,9}(,|$))*$",
        max_length=256,
        description="for tests of failures: oom@N, device-error@N or host-memory@N at step N, between commas",
    )
    tokenizer_threads: int = Field(2, ge=1, le=64, description="threads that tokenise prompts")

    max_grammar_bytes: int = Field(65536, ge=16, le=2**20, description="largest response format, bytes")
    grammar_timeout_ms: int = Field(
        10_000, ge=1, le=600_000, description="longest a response format may take to compile, milliseconds"
    )
    grammar_cache_entries: int = Field(32, ge=0, le=4096, description="compiled response formats that are kept")

    max_message_bytes: int = Field(4 * 2**20, ge=65536, le=2**28, description="largest request message, bytes")
    max_concurrent_streams: int = Field(100, ge=1, le=2**16, description="most calls open on one connection")
    max_connections: int = Field(512, ge=1, le=2**20, description="most open connections")
    max_metadata_bytes: int = Field(8192, ge=1024, le=2**20, description="largest request metadata, bytes")
    keepalive_time_ms: int = Field(
        30_000, ge=1000, le=7_200_000, description="a silent connection is pinged after this long, milliseconds"
    )
    keepalive_timeout_ms: int = Field(
        10_000, ge=100, le=600_000, description="a ping not answered for this long closes the connection, milliseconds"
    )
    min_ping_interval_ms: int = Field(
        10_000, ge=100, le=7_200_000, description="clients that ping more often are cut off, milliseconds"
    )
    max_connection_idle_ms: int = Field(
        300_000, ge=1000, le=86_400_000, description="a connection without calls closes after this long, milliseconds"
    )
    max_connection_age_ms: int = Field(
        1_800_000, ge=1000, le=86_400_000, description="a connection takes no new calls after this long, milliseconds"
    )
    handshake_timeout_ms: int = Field(
        10_000, ge=100, le=120_000, description="longest a connection may take to set up, milliseconds"
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is logged")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="json, console, or auto: console on a terminal, json elsewhere"
    )
    log_file: str = Field("", description="file to log to instead of stderr, where errors go as well")
    trace_exporter: Literal["off", "console", "otlp"] = Field(
        "off", description="where traces go: off, console (stdout) or otlp; needs the extra otel"
    )
    otlp_endpoint: str = Field(
        "", max_length=2048, description="where otlp goes, such as http://collector:4317; default: as OTEL_* says"
    )
    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of traces that are kept, where the caller has not decided"
    )
    log_max_mb: int = Field(100, ge=1, le=2**20, description="the log file is rotated daily and at this size, MB")
    log_keep_days: int = Field(7, ge=1, le=3650, description="how long rotated log files are kept, days")

    @field_validator(
        "inference_timeout_sec",
        "resume_grace_seconds",
        "drain_seconds",
        "drain_notice_seconds",
        "liveness_seconds",
        "watchdog_seconds",
        "residency_check_sec",
    )
    @classmethod
    def _finite(cls, value: float) -> float:
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError("must be a finite number")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        problems = []
        if self.allow_remote:
            if not (self.api_keys_file or self.tls_client_ca_file):
                needs = "API keys (api_keys_file) or client certificates (tls_client_ca_file)"
                problems.append(f"allow_remote: needs {needs}")
        else:
            for name in ("host", "probe_host", "admin_host"):
                address = getattr(self, name)
                if address and not is_loopback(address):
                    problems.append(f"{name}: {address!r} is not a loopback address, which needs allow_remote")
        problems += self.tls_problems()
        if self.gpu_device is not None and (self.device == "cpu" or ":" in self.device):
            problems.append(f"gpu_device: has no meaning beside device={self.device}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def cuda_device(self) -> str | None:
        """The CUDA device that was asked for, as `cuda:N`; None if the CPU may serve."""
        if self.device.startswith("cuda:"):
            return self.device
        if self.device == "cuda" or self.gpu_device is not None:
            return f"cuda:{self.gpu_device or 0}"
        return None


# Settings whose value is itself a secret; one that names a file of secrets is not.
_SECRET = re.compile(r"(^|_)(key|keys|secret|password|token|salt)$")
MASK = "********"


def shown_settings(settings: Settings) -> list[tuple[str, object, bool]]:
    """Name, value and whether it is the default, of every setting; secrets masked."""
    shown = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        secret = isinstance(value, SecretStr) or (_SECRET.search(name) is not None and bool(value))
        shown.append((name, MASK if secret else value, value == field.default))
    return shown
