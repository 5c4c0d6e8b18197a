"""A typed client of a tokenwire worker. It needs grpcio and the generated stubs, never the compiled engine."""

from tokenwire.client.aio import AsyncClient
from tokenwire.client.auth import channel_credentials
from tokenwire.client.errors import FieldViolation, ResumePoint, TokenwireRpcError
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
from tokenwire.client.retry import NO_RETRY, RetryPolicy
from tokenwire.client.streams import AsyncExecuteStream, ExecuteStream
from tokenwire.client.sync import Client

__all__ = [
    "NO_RETRY",
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
    "ResumePoint",
    "RetryPolicy",
    "SamplingParams",
    "Started",
    "Token",
    "TokenLogprob",
    "TokenwireRpcError",
    "TopLogprob",
    "channel_credentials",
]
