"""The worker's state as clients and probes see it, kept in memory so that asking costs nothing."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tokenwire.engine import AsyncEngine
from tokenwire.errors import TokenwireError
from tokenwire.rpc.validate import Limits

SERVICE_NAME = "tokenwire.v1.Inference"
DEGRADED_POOL_UTILIZATION = 0.90


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


@dataclass(frozen=True, slots=True)
class Serving:
    """All that Execute needs, present once the model is loaded."""

    engine: AsyncEngine
    text: Text
    limits: Limits
    facts: ModelFacts


@dataclass
class WorkerState:
    """Phase and progress; `changed` wakes everyone who watches.

    Attributes:
        device: where the worker computes or will compute.
        model: the name reported before the model is loaded.
        foreign_memory: what the last residency check found outside the device's memory; empty for nothing.
    """

    device: str = "cpu"
    model: str = ""
    phase: Phase = Phase.LOADING
    load_percent: int = 0
    serving: Serving | None = None
    foreign_memory: str = ""
    _residency_checked_at: float | None = None
    _started_at: float = field(default_factory=time.monotonic)
    _watchers: set[asyncio.Event] = field(default_factory=set)

    @property
    def uptime_seconds(self) -> int:
        return int(time.monotonic() - self._started_at)

    def enter(self, phase: Phase) -> None:
        """Moves to a phase. A failed worker stays failed."""
        if self.phase is not Phase.FAILED and self.phase is not phase:
            self.phase = phase
            self._notify()

    def note_residency(self, foreign_memory: str) -> None:
        """Takes the result of a residency check."""
        self._residency_checked_at = time.monotonic()
        if foreign_memory != self.foreign_memory:
            self.foreign_memory = foreign_memory
            self._notify()

    @property
    def residency_age_seconds(self) -> int | None:
        """Since the last residency check; None before the first."""
        return None if self._residency_checked_at is None else int(time.monotonic() - self._residency_checked_at)

    @property
    def resident(self) -> bool:
        """Whether all that the device computes from is known to lie in its memory."""
        return self.serving is not None and self.phase is not Phase.FAILED and not self.foreign_memory

    def _notify(self) -> None:
        for changed in self._watchers:
            changed.set()

    def watch(self) -> asyncio.Event:
        """An event that is set at every change of phase, until `unwatch`."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        return changed

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def unwatch(self, changed: asyncio.Event) -> None:
        self._watchers.discard(changed)

    def require_serving(self) -> Serving:
        """What is needed to run a job.

        Raises:
            TokenwireError: UNAVAILABLE, naming the phase.
        """
        if self.phase is Phase.READY and self.serving is not None:
            return self.serving
        message = {
            Phase.LOADING: f"the model is loading ({self.load_percent} %)",
            Phase.DRAINING: "the worker is shutting down",
        }.get(self.phase, "the worker is not serving")
        raise TokenwireError("UNAVAILABLE", message, phase=self.phase.value)

    def is_serving(self, service: str) -> bool | None:
        """Whether a `grpc.health.v1` service serves; None if there is no such service."""
        if service == "liveness":
            return self.phase is not Phase.FAILED
        if service == "startup":
            return self.serving is not None and self.phase is not Phase.FAILED
        if service in ("", "readiness", SERVICE_NAME):
            return self.phase is Phase.READY and self.resident
        return None
