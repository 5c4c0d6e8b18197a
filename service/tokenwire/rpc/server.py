"""Assembles the gRPC server: boundary outermost, the guard inside it, then the services; sets every transport limit."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import cast

import grpc
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2

from tokenwire.config import Settings
from tokenwire.rpc.admin import AdminServicer, Control, add_admin
from tokenwire.rpc.boundary import Boundary
from tokenwire.rpc.detached import DetachLimits
from tokenwire.rpc.guard import GuardLayer
from tokenwire.rpc.health import HealthServicer, add_health
from tokenwire.rpc.inference import InferenceServicer, add_inference
from tokenwire.rpc.layers import Layer, Layered
from tokenwire.rpc.reflection import add_reflection
from tokenwire.rpc.state import WorkerState
from tokenwire.security.guard import Guard
from tokenwire.v1 import admin_pb2, inference_pb2

MAX_PING_STRIKES = 2
# grpc.max_metadata_size refuses at random from the soft limit on and always from the hard one.
HARD_METADATA_FACTOR = 2


def build_server(settings: Settings, state: WorkerState, pool: Executor, guard: Guard | None = None) -> grpc.aio.Server:
    """A server that is not bound or started yet.

    Args:
        guard: decides on every call; None lets everyone in.
        state: answers Health at once, and Execute once it is ready.
        pool: threads for tokenising.
    """
    server, services = _server_with_health(settings, state, guard or Guard())
    detach_limits = DetachLimits(
        grace_s=settings.resume_grace_seconds,
        job_bytes=settings.resume_job_bytes,
        total_bytes=settings.resume_total_bytes,
        slow_reader_s=settings.slow_reader_timeout_ms / 1000,
    )
    add_inference(services, InferenceServicer(state, pool, settings.inference_timeout_sec, detach_limits))
    files = (inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
    add_reflection(services, cast(tuple[FileDescriptor, ...], files))
    return server


def build_admin_server(
    settings: Settings, state: WorkerState, control: Control, guard: Guard | None = None
) -> grpc.aio.Server:
    """A server with the AdminService, for a port of its own; not bound or started yet."""
    server, services = _server_with_health(settings, state, guard or Guard())
    add_admin(services, AdminServicer(settings, state, control))
    add_reflection(services, cast(tuple[FileDescriptor, ...], (admin_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)))
    return server


def _server_with_health(settings: Settings, state: WorkerState, guard: Guard | None) -> tuple[grpc.aio.Server, Layered]:
    """A server, and where to add the services that stand inside of the boundary and, if there is one, the guard."""
    server = grpc.aio.server(options=transport_options(settings))
    boundary = Boundary(state.metrics, state.refusals)
    layers: tuple[Layer, ...] = (boundary,) if guard is None else (boundary, GuardLayer(guard))
    services = Layered(server, *layers)
    add_health(server, services, HealthServicer(state, boundary))
    return server, services


def transport_options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else a second worker on this port would silently take half the calls
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", HARD_METADATA_FACTOR * settings.max_metadata_bytes),
        ("grpc.keepalive_time_ms", settings.keepalive_time_ms),
        ("grpc.keepalive_timeout_ms", settings.keepalive_timeout_ms),
        # The one above ends with any byte the peer sends; an answer that does not come is waited for this long instead.
        ("grpc.http2.ping_timeout_ms", settings.keepalive_timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", settings.min_ping_interval_ms),
        ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
        ("grpc.max_connection_idle_ms", settings.max_connection_idle_ms),
        ("grpc.max_connection_age_ms", settings.max_connection_age_ms),
        # A stream that is running when its connection grows old may finish: no job outlives the inference timeout.
        ("grpc.max_connection_age_grace_ms", int(settings.inference_timeout_sec * 1000) + 10_000),
        ("grpc.server_handshake_timeout_ms", settings.handshake_timeout_ms),
    ]
