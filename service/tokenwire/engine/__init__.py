"""The asyncio face of the compiled engine. Nothing in this package knows gRPC or protobuf."""

from tokenwire.engine.async_engine import AsyncEngine
from tokenwire.engine.stream import CancelOutcome, CancelResult, JobSpec, JobStream

__all__ = ["AsyncEngine", "CancelOutcome", "CancelResult", "JobSpec", "JobStream"]
