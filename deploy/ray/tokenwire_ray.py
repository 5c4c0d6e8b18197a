"""tokenwire behind Ray Serve: replicas of a worker, one gRPC port for all, as many replicas as the queue asks for.

Each replica runs `tokenwire serve` as a process of its own on loopback and hands messages through, so a replica is a
whole worker: the same validation, the same events, the same bytes. Ray's gRPC proxy takes the calls of
`tokenwire.v1.Inference`, chooses a replica and passes the stream back; a client calls it like a worker.

    pip install 'ray[serve-grpc]' tokenwire
    cd deploy/ray && TOKENWIRE_MODEL=model.gguf serve run config.yaml

`TOKENWIRE_*` variables are the settings of every replica's worker. The proxy's port asks for no key: it belongs on a
network of your own.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.grpc_util import RayServegRPCContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc as pb_grpc

NAMESPACE = "tokenwire"
START_TIMEOUT_S = 600.0
DRAIN_S = 30
# A replica with more waiting jobs than this, all the time, is one too few.
QUEUED_PER_REPLICA = 4.0
# Below this use of the KV pools, with nothing waiting, one replica fewer would do.
IDLE_UTILIZATION = 0.2

# What a call carries for Ray and for gRPC itself; all else is the worker's to read.
_NOT_FORWARDED = ("application", "request_id", "multiplexed_model_id", "user-agent", "grpc-", ":")


def replicas_for_queue(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many replicas the workers' queues ask for. Grows by what waits, shrinks one by one where nothing does."""
    metrics = context.aggregated_metrics or {}
    queued = sum(metrics.get("queued", {}).values())
    utilization = metrics.get("pool_utilization", {})
    wanted = now = context.target_num_replicas
    if queued > QUEUED_PER_REPLICA * now:
        wanted = math.ceil(queued / QUEUED_PER_REPLICA)
    elif queued == 0 and utilization and max(utilization.values()) < IDLE_UTILIZATION:
        wanted = now - 1
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, wanted)), {}


@ray.remote(num_cpus=0)
class Canceller:
    """Reaches one replica's worker from any other: a Cancel may arrive where the job is not."""

    def __init__(self, target: str) -> None:
        self._stub = pb_grpc.InferenceStub(grpc.aio.insecure_channel(target))

    async def cancel(self, request: bytes, metadata: list[tuple[str, str]]) -> bytes:
        response = await self._stub.Cancel(pb.CancelRequest.FromString(request), metadata=metadata, timeout=5)
        return bytes(response.SerializeToString())


@serve.deployment(
    max_ongoing_requests=100,
    graceful_shutdown_timeout_s=DRAIN_S + 15,
    health_check_period_s=5,
    health_check_timeout_s=10,
    autoscaling_config=AutoscalingConfig(
        min_replicas=2,
        max_replicas=4,
        upscale_delay_s=10,
        downscale_delay_s=300,
        policy=AutoscalingPolicy(policy_function=replicas_for_queue),
    ),
)
class Inference:
    """One replica. Its methods have the names of the service's: that is how Ray's proxy finds them."""

    async def __init__(self) -> None:
        target = f"127.0.0.1:{_free_port()}"
        command = [sys.executable, "-m", "tokenwire", "serve", "--host", "127.0.0.1", "--port", target.split(":")[1]]
        self._worker = await asyncio.create_subprocess_exec(*command, "--drain-seconds", str(DRAIN_S))
        self._channel = grpc.aio.insecure_channel(target)
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        await self._wait_until_ready()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        name = f"cancel-{serve.get_replica_context().replica_id.unique_id}"
        self._canceller = Canceller.options(name=name, namespace=NAMESPACE, scheduling_strategy=here).remote(target)

    async def Execute(
        self, request: pb.ExecuteRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.ExecuteEvent]:
        call = self._stub.Execute(request, metadata=_forwarded(grpc_context))
        try:
            async for event in call:
                if event.HasField("error"):
                    # What Ray's proxy shall send after a message must be set before the message.
                    grpc_context.set_trailing_metadata(_pairs(await call.trailing_metadata()))
                yield event
        except grpc.aio.AioRpcError as error:
            # Of a refusal the proxy keeps the status and the sentence; it drops the details beside them.
            grpc_context.set_code(error.code())
            grpc_context.set_details(error.details() or "")
            raise
        finally:
            call.cancel()  # nothing, if it has ended; else the client left, and the worker frees the job's blocks

    async def Attach(
        self, request: pb.AttachRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.ExecuteEvent]:
        """Refused: a detached stream rests in one worker, and the proxy does not know which."""
        grpc_context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        grpc_context.set_details("streams are not taken up again through Ray")
        raise NotImplementedError("Attach")
        yield

    async def Cancel(self, request: pb.CancelRequest, grpc_context: RayServegRPCContext) -> pb.CancelResponse:
        """Asks every replica's worker; the one that knows the job answers."""
        found = [entry["name"] for entry in ray.util.list_named_actors(True) if entry["namespace"] == NAMESPACE]
        message, metadata = request.SerializeToString(), _forwarded(grpc_context)
        answers = await asyncio.gather(
            *(ray.get_actor(name, NAMESPACE).cancel.remote(message, metadata) for name in found), return_exceptions=True
        )
        responses = [pb.CancelResponse.FromString(answer) for answer in answers if isinstance(answer, bytes)]
        # CANCELLED is the least outcome and NOT_FOUND the greatest.
        return min(responses, key=lambda response: response.outcome)

    async def Health(self, request: pb.HealthRequest, grpc_context: RayServegRPCContext) -> pb.HealthResponse:
        """Of the replica that the call meets."""
        return await self._stub.Health(request, timeout=5)

    async def check_health(self) -> None:
        """Ray replaces a replica whose worker is gone, or whose engine does not move."""
        if self._worker.returncode is not None:
            raise RuntimeError(f"the worker ended with exit status {self._worker.returncode}")
        answer = await self._health.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=5)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise RuntimeError("the engine shows no life")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `replicas_for_queue` decides by: tokenwire_request_queue_depth and tokenwire_pool_utilization_ratio."""
        health = await self._stub.Health(pb.HealthRequest(), timeout=5)
        return {"queued": float(health.queued), "pool_utilization": float(health.pool_utilization)}

    async def __del__(self) -> None:
        """Ray calls this when the replica's calls have ended, or their time is up."""
        if self._worker.returncode is None:
            self._worker.send_signal(signal.SIGTERM)
            await self._worker.wait()

    async def _wait_until_ready(self) -> None:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_at:
            if self._worker.returncode is not None:
                raise RuntimeError(f"the worker ended with exit status {self._worker.returncode}: its log says why")
            try:
                request = health_pb2.HealthCheckRequest(service="readiness")
                answer = await self._health.Check(request, timeout=1, wait_for_ready=True)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.1)
        raise RuntimeError("the worker was not ready in time")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _forwarded(context: RayServegRPCContext) -> list[tuple[str, str]]:
    return [(key, value) for key, value in context.invocation_metadata() or () if not key.startswith(_NOT_FORWARDED)]


def _pairs(metadata: Any) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in metadata or ()]


app = Inference.bind()
