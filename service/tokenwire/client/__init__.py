"""A typed client of a tokenwire worker. It needs grpcio and the generated stubs, never the compiled engine."""

from tokenwire.client.aio import AsyncClient, AsyncExecuteStream
from tokenwire.client.auth import channel_credentials
from tokenwire.client.errors import FieldViolation, TokenwireRpcError
from tokenwire.client.events import (
    CancelResult,
    End,
    Event,
    Generation,
    HealthReport,
    Metrics,
    Started,
    Token,
    TokenLogprob,
    TopLogprob,
)
from tokenwire.client.request import Message, ResponseFormat, SamplingParams
from tokenwire.client.sync import Client, ExecuteStream

__all__ = [
    "AsyncClient",
    "AsyncExecuteStream",
    "CancelResult",
    "Client",
    "End",
    "Event",
    "ExecuteStream",
    "FieldViolation",
    "Generation",
    "HealthReport",
    "Message",
    "Metrics",
    "ResponseFormat",
    "SamplingParams",
    "Started",
    "Token",
    "TokenLogprob",
    "TokenwireRpcError",
    "TopLogprob",
    "channel_credentials",
]
