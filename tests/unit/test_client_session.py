"""The client's session against a simulated worker that breaks, forgets and regroups at random: the stream stays one."""

from __future__ import annotations

import hashlib
import random
import struct

import grpc
import pytest

from tokenwire.client import End, Generation, Metrics, RetryPolicy, Started, Token, TokenwireRpcError
from tokenwire.client.session import Session
from tokenwire.v1 import inference_pb2 as pb

POLICY = RetryPolicy(attempts=1000, first_wait_s=0, most_wait_s=0)
CHARACTERS = "aé€🌍 \n"


def digest_of(ids: list[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


class SimulatedWorker:
    """An answer in groups of tokens whose text cannot be parted, as a pure function of the seed."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.seed = rng.getrandbits(64)
        self.ids = [rng.getrandbits(32) for _ in range(rng.randint(0, 40))]
        self.groups: list[tuple[int, int, str]] = []
        first = 0
        while first < len(self.ids):
            end = min(len(self.ids), first + rng.choice((1, 1, 1, 2, 3)))
            self.groups.append((first, end, "".join(rng.choices(CHARACTERS, k=rng.randint(0, 3)))))
            first = end
        self.text = "".join(text for _, _, text in self.groups)
        self.known = False
        self.seeds: list[int] = []

    def answer(self, request: pb.ExecuteRequest | pb.AttachRequest) -> list[pb.ExecuteEvent] | TokenwireRpcError:
        """All events of a call, waiting ones merged at random; or its refusal."""
        if self.rng.random() < 0.2:
            self.known = False  # it was restarted
        if isinstance(request, pb.ExecuteRequest):
            if self.known:
                return refusal("ALREADY_EXISTS", grpc.StatusCode.ALREADY_EXISTS)
            if self.rng.random() < 0.1:
                return refusal("UNAVAILABLE", grpc.StatusCode.UNAVAILABLE, retry_after_s=0.0)
            if request.HasField("seed"):
                self.seeds.append(request.seed)
            self.known = True
            first = 0
        else:
            if not self.known:
                return refusal("NOT_FOUND", grpc.StatusCode.NOT_FOUND)
            first = request.from_index
        started = pb.Started(job_id="job", model="m", seed=self.seed, attach_token=request.attach_token)
        events = [pb.ExecuteEvent(started=started), *self.tokens(first)]
        end = pb.End(tokens_out=len(self.ids), stop_reason=pb.STOP_REASON_EOS, digest=digest_of(self.ids))
        return [*events, pb.ExecuteEvent(metrics=pb.Metrics(tokens_out=len(self.ids))), pb.ExecuteEvent(end=end)]

    def tokens(self, first: int) -> list[pb.ExecuteEvent]:
        groups = [group for group in self.groups if group[1] > first]
        events = []
        while groups:
            count = self.rng.choice((1, 1, 2, 5))
            taken, groups = groups[:count], groups[count:]
            begin, end = taken[0][0], taken[-1][1]
            text = "".join(text for _, _, text in taken)
            token = pb.Token(t=text, i=begin, ids=self.ids[begin:end], digest=digest_of(self.ids[:end])[:16])
            events.append(pb.ExecuteEvent(token=token))
        return events


def refusal(code: str, status: grpc.StatusCode, retry_after_s: float | None = None) -> TokenwireRpcError:
    return TokenwireRpcError(code, "refused", status=status, retry_after_s=retry_after_s, from_worker=True)


def drive(session: Session, worker: SimulatedWorker, rng: random.Random) -> None:
    """Calls until the session is over; each call may break after any of its events."""
    while not session.over:
        answer = worker.answer(session.request)
        if isinstance(answer, TokenwireRpcError):
            session.failed(answer)
            continue
        seen = rng.randint(0, len(answer)) if rng.random() < 0.8 else len(answer)
        for event in answer[:seen]:
            session.receive(event)
        if seen == len(answer):
            session.ended()
        else:
            session.failed(TokenwireRpcError("UNAVAILABLE", "Socket closed", status=grpc.StatusCode.UNAVAILABLE))


@pytest.mark.parametrize("block", range(10))
def test_whatever_breaks_the_caller_sees_one_unbroken_stream(block: int) -> None:
    calls = 0
    for case in range(200):
        rng = random.Random(1000 * block + case)
        worker = SimulatedWorker(rng)
        session = Session(pb.ExecuteRequest(job_id="job", detach=True, attach_token="t" * 20), POLICY, None)
        drive(session, worker, rng)
        events = list(session.ready)
        assert [type(event) for event in events] == [Started, *[Token] * (len(events) - 3), Metrics, End]
        generation = Generation.from_events(events)
        assert (generation.text, list(generation.token_ids)) == (worker.text, worker.ids)
        index = 0
        for event in events[1:-2]:
            assert isinstance(event, Token)
            assert event.index == index
            index += len(event.ids)
        assert set(worker.seeds) <= {worker.seed}
        calls += session.num_calls
    assert calls > 600, "too little was broken"


@pytest.mark.parametrize("block", range(5))
def test_an_answer_that_changed_never_passes_for_the_same(block: int) -> None:
    """One id differs the second time; whether the difference is in what came or in what is to come, it is found."""
    found = 0
    for case in range(100):
        rng = random.Random(1000 * block + case)
        worker = SimulatedWorker(rng)
        if len(worker.ids) < 2:
            continue
        session = Session(pb.ExecuteRequest(job_id="job", detach=True, attach_token="t" * 20), POLICY, None)
        first = worker.tokens(0)
        session.receive(pb.ExecuteEvent(started=pb.Started(job_id="job", model="m", seed=worker.seed)))
        for event in first[: rng.randint(1, len(first))]:
            session.receive(event)
        session.failed(TokenwireRpcError("UNAVAILABLE", "Socket closed", status=grpc.StatusCode.UNAVAILABLE))
        session.failed(refusal("NOT_FOUND", grpc.StatusCode.NOT_FOUND))
        known = session.next_index
        worker.ids[rng.randrange(known)] ^= 1
        worker.known = False
        with pytest.raises(TokenwireRpcError, match="DIGEST_MISMATCH"):
            drive(session, worker, random.Random(1))
        found += 1
    assert found > 50
