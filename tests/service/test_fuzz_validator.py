"""Random requests and random bytes through everything between the wire and the engine: nothing but a typed refusal may
come of them. 15 seconds by default; with `-m slow`, 10 minutes. `FUZZ_SEED` repeats a run."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Sequence
from typing import Any

import pytest

from e2e.helpers import only_when_asked, say
from tokenwire import _native
from tokenwire.engine.fake import varint
from tokenwire.engine.grammars import find_grammar_compiler
from tokenwire.errors import TokenwireError
from tokenwire.rpc import convert, status
from tokenwire.rpc.boundary import _guarded_deserializer, _Malformed, _require_parsed
from tokenwire.rpc.context import fit_context
from tokenwire.rpc.response_format import ResponseFormat, check_format, grammar_text
from tokenwire.rpc.validate import Limits, check_request
from tokenwire.v1 import inference_pb2 as pb

LIMITS = Limits(
    max_prompt_chars=1000,
    max_chat_messages=8,
    max_tokens_in=0,
    max_tokens_out=2048,
    vocab_size=1000,
    context_length=4096,
    max_token_bytes=16,
    max_grammar_bytes=4096,
)
PRIVATE = "correct horse battery"
FLOATS = [0.0, -0.0, 0.5, 1.0, 2.0, 2.0000002, -1e-45, 1e38, -1e38, float("nan"), float("inf"), float("-inf")]
INTEGERS = [0, 1, -1, 20, 21, 127, 128, 999, 1000, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
ATOMS = ["", PRIVATE, "\0", "é", "\U0001f600", "\ufffd", "a" * 200, "../../etc/passwd", "<|im_end|>", "%s{0}", "‮"]
GRAMMAR_PIECES = [
    *'{}[]":,()*+?|\\.^$-&~/<>#@!0123456789 \n',
    *(
        "type",
        "object",
        "array",
        "string",
        "integer",
        "enum",
        "$ref",
        "#",
        "#/$defs/a",
        "$defs",
        "items",
        "anyOf",
        "allOf",
    ),
    *(
        "properties",
        "required",
        "pattern",
        "minLength",
        "maxItems",
        "multipleOf",
        "x-guidance",
        "null",
        "true",
        "1e999",
    ),
    *(
        "[a-z]",
        "{2,}",
        "{1000}",
        "\\d",
        "\\p{L}",
        "(?i)",
        "(?=",
        "a",
        "é",
        "\ud800".encode("utf-8", "surrogatepass").hex(),
    ),
]


class Fuzzer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.boldness = 1.0  # how often a value is any at all; else it is one that most fields accept

    def value(self, good: Sequence[Any], any_: Sequence[Any]) -> Any:
        return self.random.choice(any_ if self.random.random() < self.boldness else good)

    def text(self) -> str:
        return "".join(self.value(["ab", PRIVATE], ATOMS) for _ in range(self.value([1], [0, 1, 1, 2, 30])))

    def grammar(self) -> str:
        size = self.random.choice([1, 3, 10, 40, 400])
        pieces = [self.random.choice(GRAMMAR_PIECES) for _ in range(size)]
        return "".join(f'"{piece}"' if self.random.random() < 0.2 else piece for piece in pieces)

    def schema(self, depth: int = 4) -> Any:
        """JSON of the right words in wrong places."""
        kind = self.random.randrange(6 if depth else 3)
        if kind == 0:
            return self.random.choice([*ATOMS, *INTEGERS, None, True, 0.5])
        if kind in (1, 2):
            return self.random.choice(["object", "array", "string", "integer", "number", "#", "^a+$", 3])
        if kind == 3:
            return [self.schema(depth - 1) for _ in range(self.random.randrange(4))]
        keys = ["type", "enum", "const", "items", "anyOf", "allOf", "$ref", "properties", "required", "pattern", "x"]
        return {self.random.choice(keys): self.schema(depth - 1) for _ in range(self.random.randrange(5))}

    def format(self) -> ResponseFormat:
        if self.random.random() < 0.5:
            return ResponseFormat("regex", self.grammar())
        return ResponseFormat("json_schema", json.dumps(self.schema()))

    def message(self) -> pb.ExecuteRequest:
        """A request of the right types and any values."""
        request = pb.ExecuteRequest()
        self.boldness = self.random.choice([0.0, 0.05, 0.3, 1.0])
        for descriptor in pb.ExecuteRequest.DESCRIPTOR.fields:
            if self.random.random() < 0.6:
                continue
            self.fill(request, descriptor)
        if self.random.random() > self.boldness / 2:
            request.job_id = "fuzz"
        if not request.WhichOneof("input") and self.random.random() > self.boldness:
            request.prompt = "x"
        return request

    def fill(self, request: pb.ExecuteRequest, descriptor: Any) -> None:
        name, some = descriptor.name, range(self.value([1, 2], [0, 1, 3, 40]))
        if name == "prompt_tokens":
            request.prompt_tokens.ids.extend(self.value([1, 999], INTEGERS) % 2**32 for _ in some)
        elif name == "chat":
            good, roles = ["user", "assistant"], ["user", "system", "root", ""]
            turns = [pb.ChatMessage(role=self.value(good, roles), content=self.text()) for _ in some]
            request.chat.CopyFrom(pb.Chat(messages=turns))
        elif name == "stop":
            request.stop.extend(self.text() for _ in some)
        elif name == "logit_bias":
            for _ in some:
                request.logit_bias[self.value([1, 2], INTEGERS) % 2**32] = self.value([-1.0, 2.0], FLOATS)
        elif name == "response_format":
            wanted = self.format()
            request.response_format.SetInParent()
            if self.random.random() > self.boldness / 2:
                setattr(request.response_format, wanted.kind, wanted.text)
        elif descriptor.type == descriptor.TYPE_STRING:
            setattr(request, name, self.text())
        elif descriptor.type == descriptor.TYPE_FLOAT:
            setattr(request, name, self.value([0.5, 1.0], FLOATS))
        elif descriptor.type == descriptor.TYPE_BOOL:
            setattr(request, name, self.random.random() < 0.5)
        else:
            bits, signed = (64, False) if descriptor.type == descriptor.TYPE_UINT64 else (32, descriptor.type == 5)
            value = self.value([1, 2], INTEGERS) % 2**bits
            setattr(request, name, value - 2**bits if signed and value >= 2 ** (bits - 1) else value)

    def bytes(self) -> bytes:
        """A message, and often what a broken or hostile client makes of it."""
        data = bytearray(self.message().SerializeToString())
        for _ in range(self.random.choice([0, 0, 0, 1, 3])):
            place = self.random.randrange(len(data) + 1)
            kind = self.random.randrange(5)
            if kind == 0 and data:
                data[place % len(data)] ^= 1 << self.random.randrange(8)
            elif kind == 1:
                del data[place:]
            elif kind == 2:
                data[place:place] = self.random.randbytes(self.random.randrange(9))
            elif kind == 3:
                number, wire = self.random.randrange(1, 40), self.random.randrange(8)
                data[place:place] = varint(number << 3 | wire) + varint(self.random.choice(INTEGERS) & (2**64 - 1))
            else:
                data += struct.pack("<f", self.random.choice(FLOATS)) + bytes(data[:place])
        return bytes(data)


def answer(data: bytes) -> TokenwireError | None:
    """What the service makes of a message, short of tokenising it: the same functions, in the same order."""
    request = _guarded_deserializer(pb.ExecuteRequest.FromString)(data)
    try:
        _require_parsed(request)
        assert not isinstance(request, _Malformed)
        raw = convert.raw_request(request, LIMITS)
        check_request(raw, LIMITS, len)
        fit_context(len(raw.prompt or raw.prompt_tokens or "x"), raw.max_tokens, LIMITS, "prompt")
    except TokenwireError as error:
        return error
    return None


def check_refusal(error: TokenwireError) -> None:
    code, message, trailers = status.to_abort(error)
    details = dict(trailers)["grpc-status-details-bin"]
    assert len(details) <= 4096
    assert PRIVATE not in message
    assert PRIVATE.encode() not in details
    assert b"etc/passwd" not in details
    assert code.value[0] in (3, 11)
    assert error.fields or error.code == "CONTEXT_LENGTH_EXCEEDED"


def compiles(compiler: Any, wanted: ResponseFormat) -> bool:
    """Whether a format can be compiled; if not, the reason must be fit to be read."""
    if any(check_format(wanted, LIMITS.max_grammar_bytes)):
        return False
    try:
        compiler.compile(wanted.kind, grammar_text(wanted))
    except _native.EngineError as error:
        refusal = error
    else:
        return True
    assert refusal.code == "INVALID_REQUEST"
    assert str(refusal).isprintable()
    return False


def fuzz(seconds: float) -> None:
    seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    fuzzer = Fuzzer(seed)
    make = find_grammar_compiler([b"", *(bytes([value]) for value in range(256))], [0])
    assert make is not None
    compiler = make()
    give_up_at = time.monotonic() + seconds
    accepted = refused = compiled = 0
    while time.monotonic() < give_up_at:
        data, wanted = b"", None
        try:
            for _ in range(50):
                data = fuzzer.bytes()
                error = answer(data)
                if error is not None:
                    check_refusal(error)
                refused += error is not None
                accepted += error is None
            wanted = fuzzer.format()
            compiled += compiles(compiler, wanted)
        except BaseException:
            say(f"FUZZ_SEED={seed}; message {data.hex()[:2000]}; {wanted}")
            raise
    say(f"seed {seed}: {accepted} requests accepted, {refused} refused, {compiled} formats compiled, 0 uncaught")
    assert min(accepted, refused, compiled) > 0


def test_nothing_but_typed_refusals_comes_of_random_requests() -> None:
    fuzz(15)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_but_typed_refusals_comes_of_ten_minutes_of_random_requests(request: pytest.FixtureRequest) -> None:
    only_when_asked(request)
    fuzz(600)
