"""Open streams that never cease, and what became of each: the load under which workers are restarted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc

from tokenwire.v1 import inference_pb2 as pb
from tokenwire.v1 import inference_pb2_grpc as pb_grpc

# A call that was refused before it began may be sent again: gRPC does it by itself, when it is told so.
RETRY_POLICY = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "tokenwire.v1.Inference"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


@dataclass
class Stream:
    """One job as its client saw it.

    Attributes:
        is_long: cannot finish while its worker drains.
        began_at, ended_at: monotonic seconds.
        kind: `end`, the code of an `error` event, or `refused` (no event at all).
        fault: why the stream was not as promised; empty if it was.
    """

    is_long: bool
    began_at: float
    ended_at: float = 0.0
    kind: str = ""
    fault: str = ""
    digest: str = ""
    ids: list[int] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return bool(self.ids) and not self.ended_at


class EndlessLoad:
    """Keeps streams open through a proxy until it is told to stop.

    Args:
        target: the proxy's address.
        num_short, num_long: streams that are open together.
        short_tokens, long_tokens: how much each kind generates.
    """

    def __init__(self, target: str, *, num_short: int, num_long: int, short_tokens: int, long_tokens: int) -> None:
        self.streams: list[Stream] = []
        self._target = target
        self._tokens = {False: short_tokens, True: long_tokens}
        self._kinds = [False] * num_short + [True] * num_long
        self._newest: dict[int, Stream] = {}
        self._stopping = False

    @property
    def num_open(self) -> int:
        return sum(stream.is_open for stream in self._newest.values())

    @property
    def outcomes(self) -> Counter[tuple[bool, str]]:
        return Counter((stream.is_long, stream.kind) for stream in self.streams)

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._target, [("grpc.service_config", RETRY_POLICY)]) as channel:
            stub = pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            await asyncio.gather(*(self._client(stub, number, is_long) for number, is_long in enumerate(self._kinds)))

    def stop(self) -> None:
        self._stopping = True

    async def wait_open(self, wanted: int, timeout_s: float = 60.0) -> None:
        give_up_at = time.monotonic() + timeout_s
        while self.num_open < wanted:
            assert time.monotonic() < give_up_at, f"only {self.num_open} of {wanted} streams are open"
            await asyncio.sleep(0.01)

    async def _client(self, stub: pb_grpc.InferenceStub, number: int, is_long: bool) -> None:
        for turn in range(1_000_000):
            if self._stopping:
                return
            stream = Stream(is_long, time.monotonic())
            self.streams.append(stream)
            self._newest[number] = stream
            request = pb.ExecuteRequest(
                job_id=f"client-{number}-{turn}",
                prompt="Once upon a time there was a river that",
                max_tokens=self._tokens[is_long],
                temperature=0.0,
                logit_bias={0: -100.0, 2: -100.0},  # no early end
            )
            await self._read(stub, request, stream)
            stream.ended_at = time.monotonic()

    async def _read(self, stub: pb_grpc.InferenceStub, request: pb.ExecuteRequest, stream: Stream) -> None:
        call = stub.Execute(request, timeout=300)
        terminal: pb.End | pb.Error | None = None
        try:
            async for event in call:
                kind = event.WhichOneof("event")
                if terminal is not None:
                    stream.fault = f"{kind} after the terminal event"
                if kind == "token":
                    if event.token.i != len(stream.ids):
                        stream.fault = f"token {event.token.i} after {len(stream.ids)} tokens"
                    stream.ids.extend(event.token.ids)
                    if self._stopping and stream.is_long:
                        call.cancel()
                elif kind == "end":
                    terminal = event.end
                elif kind == "error":
                    terminal = event.error
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
        except grpc.aio.AioRpcError as error:
            if terminal is None and stream.ids:
                stream.fault = f"cut off after {len(stream.ids)} tokens: {error.code().name} {error.details()}"
            elif terminal is None:
                stream.kind = "refused"
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    stream.fault = f"refused with {error.code().name} {error.details()}"
            elif isinstance(terminal, pb.End):
                stream.fault = f"{error.code().name} after the end"
        if isinstance(terminal, pb.Error):
            stream.kind = terminal.code
        elif isinstance(terminal, pb.End):
            stream.kind, stream.digest = "end", terminal.digest
            if terminal.digest != hashlib.sha256(struct.pack(f"<{len(stream.ids)}I", *stream.ids)).hexdigest():
                stream.fault = "the digest is not that of the tokens"
        elif not stream.fault and stream.kind != "refused":
            stream.kind = "cancelled" if call.cancelled() else ""
            stream.fault = "" if stream.kind else "no terminal event"
