"""What the tests of the HTTP port's callers share: a request, and a stream that has begun."""

from __future__ import annotations

from typing import Any


def body(job_id: str = "job-1", **fields: Any) -> dict[str, Any]:
    return {"job_id": job_id, "prompt": "Hello", **fields}


async def started(lines: Any) -> str:
    """Reads a stream up to the payload of `started`."""
    async for line in lines:
        if line.startswith("data:"):
            return str(line)
    raise AssertionError("the stream ended")
