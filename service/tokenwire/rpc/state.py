"""The worker's state as clients and probes see it, kept in memory so that asking costs nothing."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tokenwire.engine import AsyncEngine
from tokenwire.engine.grammars import Grammars
from tokenwire.errors import TokenwireError
from tokenwire.observe.collect import Snapshot, WorkerMetrics
from tokenwire.observe.refusals import RefusalLog
from tokenwire.observe.tracing import JobTracer
from tokenwire.rpc.validate import Limits

SERVICE_NAME = "tokenwire.v1.Inference"
# What `grpc.health.v1` can be asked about.
SERVICES = ("", SERVICE_NAME, "liveness", "readiness", "startup")
MOST_POOL_UTILIZATION = 0.90
"""Share of the KV pool in use above which a worker should get no more work."""
DEFAULT_LIVENESS_S = 30.0


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What Health says about the loaded model and its device; fields as in `HealthResponse`."""

    name: str
    quant_kind: str
    tokenizer_kind: str
    vocab_size: int
    context_length: int
    device: str
    device_name: str = ""
    sm: int = 0
    cuda_runtime_version: str = ""


class Text(Protocol):
    """What Execute uses of `tokenwire.text`. Every call may take long and belongs into a thread."""

    def encode_prompt(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]: ...
    def count_tokens(self, text: str) -> int: ...


class DetachedCounts(Protocol):
    """What a scrape asks of the jobs that outlive their calls."""

    @property
    def num_jobs(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Serving:
    """All that Execute needs, present once the model is loaded."""

    engine: AsyncEngine
    text: Text
    limits: Limits
    facts: ModelFacts
    grammars: Grammars | None = None


@dataclass(frozen=True, slots=True)
class HealthView:
    """What the three probes answer at one moment.

    Attributes:
        live: the process should go on; false once the engine's thread failed or shows no life.
        started: the model was loaded and has computed.
        admitting: Execute admits jobs.
        ready: the worker should get more work.
        reason: why it is not ready, one of `starting`, `draining`, `failed`, `engine_stalled`, `not_resident`,
            `pool_near_exhaustion`, `degraded`; empty when it is.
    """

    live: bool
    started: bool
    admitting: bool
    ready: bool
    reason: str


@dataclass
class WorkerState:
    """Phase and progress; watchers are told when a probe's answer changes.

    Attributes:
        device: where the worker computes or will compute.
        model: the name reported before the model is loaded.
        foreign_memory: what the last residency check found outside the device's memory; empty for nothing.
        liveness_s: an engine that shows no life for longer is not live, seconds.
        tracer: makes the spans of jobs; None: there are none.
        refusals: where refused calls are written down.
        degraded: why the worker serves but should get no more work; empty if it should.
    """

    device: str = "cpu"
    model: str = ""
    phase: Phase = Phase.LOADING
    load_percent: int = 0
    serving: Serving | None = None
    foreign_memory: str = ""
    _residency_checked_at: float | None = None
    liveness_s: float = DEFAULT_LIVENESS_S
    degraded: str = ""
    detached: DetachedCounts | None = None
    tracer: JobTracer | None = None
    refusals: RefusalLog = field(default_factory=RefusalLog)
    _started_at: float = field(default_factory=time.monotonic)
    _watchers: set[Callable[[], None]] = field(default_factory=set)
    _seen: HealthView | None = None

    def __post_init__(self) -> None:
        self.metrics = WorkerMetrics(self.snapshot)

    @property
    def uptime_seconds(self) -> int:
        return int(time.monotonic() - self._started_at)

    def enter(self, phase: Phase) -> None:
        """Moves to a phase. A failed worker stays failed."""
        if self.phase is not Phase.FAILED:
            self.phase = phase
            self.refresh()

    def note_residency(self, foreign_memory: str) -> None:
        """Takes the result of a residency check."""
        self._residency_checked_at = time.monotonic()
        self.foreign_memory = foreign_memory
        self.refresh()

    @property
    def residency_age_seconds(self) -> int | None:
        """Since the last residency check; None before the first."""
        return None if self._residency_checked_at is None else int(time.monotonic() - self._residency_checked_at)

    @property
    def resident(self) -> bool:
        """Whether all that the device computes from is known to lie in its memory."""
        return self.serving is not None and self.phase is not Phase.FAILED and not self.foreign_memory

    def refresh(self) -> None:
        """Tells the watchers if a probe would now answer differently. Called at every change and a few times a second,
        since an engine that stalls or fills up tells nobody."""
        view = self.view()
        if view != self._seen:
            self._seen = view
            for on_change in self._watchers:
                on_change()

    def view(self) -> HealthView:
        """What the probes answer now, from memory."""
        stats = self.serving.engine.stats() if self.serving is not None else None
        failed = self.phase is Phase.FAILED or (stats is not None and bool(stats.failure))
        stalled = stats is not None and stats.heartbeat_age_ms > self.liveness_s * 1000
        started = stats is not None and not failed
        full = stats is not None and stats.used_blocks > MOST_POOL_UTILIZATION * stats.total_blocks
        reasons = (
            (failed, "failed"),
            (self.phase is Phase.LOADING, "starting"),
            (self.phase is Phase.DRAINING, "draining"),
            (stalled, "engine_stalled"),
            (not self.resident, "not_resident"),
            (full, "pool_near_exhaustion"),
            (bool(self.degraded), "degraded"),
        )
        reason = next((name for holds, name in reasons if holds), "")
        return HealthView(
            live=not (failed or stalled),
            started=started,
            admitting=self.phase is Phase.READY and not failed and self.resident,
            ready=not reason,
            reason=reason,
        )

    def snapshot(self) -> Snapshot:
        """The worker as a scrape sees it. Any thread may ask."""
        facts = self.serving.facts if self.serving is not None else None
        return Snapshot(
            phase=self.phase.value,
            ready=self.view().ready,
            load_percent=self.load_percent,
            uptime_s=time.monotonic() - self._started_at,
            model=facts.name if facts is not None else self.model,
            device=facts.device if facts is not None else self.device,
            quant_kind=facts.quant_kind if facts is not None else "",
            engine=self.serving.engine.stats() if self.serving is not None else None,
            detached_jobs=self.detached.num_jobs if self.detached is not None else 0,
            detached_bytes=self.detached.num_bytes if self.detached is not None else 0,
        )

    def watch(self, on_change: Callable[[], None]) -> None:
        """Has `on_change` called at once whenever a probe's answer changes, until `unwatch`. It must not raise."""
        self._watchers.add(on_change)

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def unwatch(self, on_change: Callable[[], None]) -> None:
        self._watchers.discard(on_change)

    def require_serving(self) -> Serving:
        """What is needed to run a job.

        Raises:
            TokenwireError: UNAVAILABLE, naming the phase.
        """
        if self.phase is Phase.READY and self.serving is not None:
            return self.serving
        message = {
            Phase.LOADING: f"the model is loading ({self.load_percent} %)",
            Phase.DRAINING: "the worker is draining",
        }.get(self.phase, "the worker is not serving")
        raise TokenwireError("UNAVAILABLE", message, phase=self.phase.value)

    def is_serving(self, service: str) -> bool | None:
        """Whether a `grpc.health.v1` service serves; None if there is no such service.

        `""` and the service's own name say whether Execute admits jobs, `readiness` whether more should be sent.
        """
        view = self.view()
        return {
            "": view.admitting,
            SERVICE_NAME: view.admitting,
            "liveness": view.live,
            "readiness": view.ready,
            "startup": view.started,
        }.get(service)
