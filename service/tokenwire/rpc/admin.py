"""The `tokenwire.v1.AdminService`: what an operator may do to a running worker. Every change is a line in the log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from tokenwire.config import Settings, shown_settings
from tokenwire.errors import FieldViolation, TokenwireError, invalid_request
from tokenwire.observe.logging import get_logger
from tokenwire.rpc.boundary import Context
from tokenwire.rpc.layers import Registry
from tokenwire.rpc.state import Phase, Serving, WorkerState
from tokenwire.v1 import admin_pb2 as pb

ADMIN_SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
MAX_WAIT_MS = 3_600_000
BATCH_WINDOW_MS = (1, 1000)
SALT_DIGEST_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Control:
    """What the service may do to the process.

    Attributes:
        stop: begins what SIGTERM begins.
        is_stopping: whether that has begun.
    """

    stop: Callable[[], None]
    is_stopping: Callable[[], bool]


class AdminServicer:
    def __init__(self, settings: Settings, state: WorkerState, control: Control) -> None:
        self._settings = settings
        self._state = state
        self._control = control

    async def drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        if request.wait_ms > MAX_WAIT_MS:
            raise _out_of_range("wait_ms", 0, MAX_WAIT_MS, request.wait_ms)
        engine = self._serving().engine
        if self._state.phase is not Phase.DRAINING:
            _audit("drain", context, live=engine.num_live)
        self._state.enter(Phase.DRAINING)
        engine.stop_admitting()
        if request.wait_ms:
            await engine.wait_idle(request.wait_ms / 1000)
        return pb.DrainResponse(live=engine.num_live)

    async def undrain(self, request: pb.UndrainRequest, context: Context) -> pb.UndrainResponse:
        serving = self._serving()
        if self._control.is_stopping() or self._state.phase is Phase.FAILED:
            raise TokenwireError("UNAVAILABLE", "the process is shutting down", phase=self._state.phase.value)
        if self._state.phase is Phase.DRAINING:
            serving.engine.resume_admitting()
            self._state.enter(Phase.READY)
            _audit("undrain", context)
        return pb.UndrainResponse(admitting=self._state.view().admitting)

    async def shutdown(self, request: pb.ShutdownRequest, context: Context) -> pb.ShutdownResponse:
        _audit("shutdown", context)
        self._control.stop()
        return pb.ShutdownResponse(drain_seconds=self._settings.drain_seconds)

    async def get_batch_window(self, request: pb.GetBatchWindowRequest, context: Context) -> pb.GetBatchWindowResponse:
        return pb.GetBatchWindowResponse(window_ms=self._serving().engine.batch_window_ms)

    async def set_batch_window(self, request: pb.SetBatchWindowRequest, context: Context) -> pb.SetBatchWindowResponse:
        least, most = BATCH_WINDOW_MS
        kind = request.WhichOneof("window")
        if kind == "window_ms" and least <= request.window_ms <= most:
            wanted = request.window_ms
        elif kind == "reset" and request.reset:
            wanted = self._settings.batch_window_ms
        else:
            raise _out_of_range("window_ms", least, most, request.window_ms)
        engine = self._serving().engine
        previous = engine.batch_window_ms
        engine.batch_window_ms = wanted
        _audit("set_batch_window", context, previous_ms=previous, window_ms=wanted)
        return pb.SetBatchWindowResponse(previous_ms=previous, window_ms=wanted)

    async def list_cache(self, request: pb.ListCacheRequest, context: Context) -> pb.ListCacheResponse:
        engine = self._serving().engine
        contents, finding = await engine.inspect_cache()
        stats = engine.stats()
        shares = sorted((_salt_digest(salt), cached, shared) for salt, (cached, shared) in contents.items())
        return pb.ListCacheResponse(
            shares=[
                pb.CacheShare(salt_digest=digest, cached_blocks=cached, shared_blocks=shared)
                for digest, cached, shared in shares
            ],
            block_tokens=stats.block_tokens,
            total_blocks=stats.total_blocks,
            free_blocks=stats.free_blocks,
            used_blocks=stats.used_blocks,
            cached_blocks=stats.cached_blocks,
            finding=finding,
        )

    async def clear_cache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:
        blocks = await self._serving().engine.clear_cache()
        _audit("clear_cache", context, blocks=blocks)
        return pb.ClearCacheResponse(blocks=blocks)

    async def get_config(self, request: pb.GetConfigRequest, context: Context) -> pb.GetConfigResponse:
        settings = (
            pb.Setting(name=name, value_json=json.dumps(value), is_default=is_default)
            for name, value, is_default in shown_settings(self._settings)
        )
        return pb.GetConfigResponse(settings=settings)

    def _serving(self) -> Serving:
        """What serves, also while it drains.

        Raises:
            TokenwireError: UNAVAILABLE until the model is loaded.
        """
        if self._state.serving is None:
            return self._state.require_serving()
        return self._state.serving


def add_admin(server: Registry, servicer: AdminServicer) -> None:
    methods: dict[str, tuple[Callable[[Any, Any], Any], Any, Any]] = {
        "Drain": (servicer.drain, pb.DrainRequest, pb.DrainResponse),
        "Undrain": (servicer.undrain, pb.UndrainRequest, pb.UndrainResponse),
        "Shutdown": (servicer.shutdown, pb.ShutdownRequest, pb.ShutdownResponse),
        "GetBatchWindow": (servicer.get_batch_window, pb.GetBatchWindowRequest, pb.GetBatchWindowResponse),
        "SetBatchWindow": (servicer.set_batch_window, pb.SetBatchWindowRequest, pb.SetBatchWindowResponse),
        "ListCache": (servicer.list_cache, pb.ListCacheRequest, pb.ListCacheResponse),
        "ClearCache": (servicer.clear_cache, pb.ClearCacheRequest, pb.ClearCacheResponse),
        "GetConfig": (servicer.get_config, pb.GetConfigRequest, pb.GetConfigResponse),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            handler, request_deserializer=request.FromString, response_serializer=response.SerializeToString
        )
        for name, (handler, request, response) in methods.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(ADMIN_SERVICE_NAME, handlers),))


def _audit(action: str, context: Context, **fields: int) -> None:
    get_logger().warning("admin", action=action, peer=context.peer(), **fields)


def _salt_digest(salt: bytes) -> str:
    return hashlib.sha256(salt).hexdigest()[:SALT_DIGEST_DIGITS] if salt else ""


def _out_of_range(field: str, least: int, most: int, value: int) -> TokenwireError:
    constraint = f"range({least}..={most})"
    message = f"{field} must be from {least} to {most}"
    return invalid_request([FieldViolation(field, "RANGE", constraint, message, str(value))])
