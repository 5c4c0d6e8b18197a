"""From a JSON body to a request: types are checked here, values by the worker's own validator, and every violation of
both is reported at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenwire.client.request import Message, build_request
from tokenwire.errors import FieldViolation, TokenwireError, invalid_request
from tokenwire.rpc.validate import Limits, RawRequest, check_request
from tokenwire.v1 import inference_pb2 as pb

INTEGERS = ("max_tokens", "top_k", "seed", "priority")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
SAMPLING = (*INTEGERS, *NUMBERS, "logprobs", "stop", "logit_bias", "cache_salt")

# Before a worker has told its limits, only what the wire can carry is a bound; the worker checks the rest.
_UINT32 = 2**32 - 1
UNKNOWN_LIMITS = Limits(
    max_prompt_chars=_UINT32,
    max_chat_messages=_UINT32,
    max_tokens_in=0,
    max_tokens_out=_UINT32,
    vocab_size=_UINT32,
    context_length=_UINT32,
    max_token_bytes=_UINT32,
    max_grammar_bytes=_UINT32,
)


class Fields:
    """Takes typed values out of a JSON object. A value of the wrong type is noted and reads as unset, and so does null.

    Attributes:
        violations: what was wrong so far.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.violations: list[FieldViolation] = []
        self._body = body
        self._taken: set[str] = set()

    @property
    def unknown(self) -> list[str]:
        """Names that nobody asked for."""
        return [name for name in self._body if name not in self._taken]

    def any(self, name: str) -> Any:
        self._taken.add(name)
        return self._body.get(name)

    def string(self, name: str) -> str | None:
        value: str | None = self._taken_as(name, "a string", is_string)
        return value

    def boolean(self, name: str) -> bool | None:
        value: bool | None = self._taken_as(name, "a boolean", is_boolean)
        return value

    def integer(self, name: str) -> int | None:
        value: int | None = self._taken_as(name, "an integer", is_integer)
        return value

    def number(self, name: str) -> float | None:
        value: float | None = self._taken_as(name, "a number", is_number)
        return value

    def _taken_as(self, name: str, kind: str, is_kind: Callable[[object], bool]) -> Any:
        value = self.any(name)
        if value is None or is_kind(value):
            return value
        self.wrong_type(name, kind)
        return None

    def strings(self, name: str) -> Sequence[str]:
        """One string or a list of them."""
        value = self.any(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        self.wrong_type(name, "a string or a list of strings")
        return ()

    def token_biases(self, name: str) -> dict[int, float]:
        """An object from token ids, as strings of digits, to numbers."""
        value = self.any(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong_type(name, "an object")
            return {}
        result: dict[int, float] = {}
        for key, bias in value.items():
            token = int(key) if key.isascii() and key.isdigit() and len(key) <= 20 else None
            if token is None or token in result:
                self.refuse(f"{name}[…]", "TYPE", "type(token id)", "each name must be one token id in digits")
            elif not is_number(bias):
                self.wrong_type(f"{name}[{token}]", "a number")
            else:
                result[token] = bias
        return result

    def wrong_type(self, name: str, kind: str) -> None:
        self.refuse(name, "TYPE", f"type({kind.split(' ', 1)[1]})", f"must be {kind}")

    def refuse(self, name: str, reason: str, constraint: str, message: str, value: str | None = None) -> None:
        self.violations.append(FieldViolation(name, reason, constraint, message, value))


def is_string(value: object) -> bool:
    return isinstance(value, str)


def is_boolean(value: object) -> bool:
    return isinstance(value, bool)


def is_integer(value: object) -> bool:
    """JSON's 1.0 and true are no integers here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sampling(fields: Fields) -> dict[str, Any]:
    """The parameters that every kind of request names alike."""
    values: dict[str, Any] = {name: fields.integer(name) for name in INTEGERS}
    values.update({name: fields.number(name) for name in NUMBERS})
    values["stop"] = fields.strings("stop")
    values["logit_bias"] = fields.token_biases("logit_bias")
    values["cache_salt"] = fields.string("cache_salt")
    return values


def checked_request(
    fields: Fields,
    raw: RawRequest,
    limits: Limits | None,
    renamed: Callable[[str], str] = lambda name: name,
) -> pb.ExecuteRequest:
    """The message for the worker.

    Args:
        limits: of the worker; None if it has not told them.
        renamed: from a field of ours to the client's name for it.

    Raises:
        TokenwireError: INVALID_REQUEST with every violation of type or value.
    """
    violations = list(fields.violations)
    refused = {_root(violation.field) for violation in violations}
    try:
        # Only the worker can count the tokens of a stop string.
        check_request(raw, limits or UNKNOWN_LIMITS, lambda text: 1)
    except TokenwireError as error:
        seen = (_renamed(violation, renamed) for violation in error.fields)
        # A field of the wrong type reads as unset, which need not be said too.
        violations += [violation for violation in seen if _root(violation.field) not in refused]
    if violations:
        raise invalid_request(violations)
    params: Any = {name: getattr(raw, name) for name in SAMPLING}
    if raw.response_format is not None:
        params["response_format"] = {raw.response_format.kind: raw.response_format.text}
    chat = None
    if raw.chat is not None:
        chat = [Message(role=role, content=content) for role, content in raw.chat]
    request = build_request(raw.prompt, chat, raw.prompt_tokens, raw.job_id, params)
    if raw.detach:
        request.detach = True
    if raw.attach_token is not None:
        request.attach_token = raw.attach_token
    return request


def rename_failure(error: TokenwireError, renamed: Callable[[str], str]) -> TokenwireError:
    """A worker's refusal with the client's names for its fields."""
    if not error.fields:
        return error
    return invalid_request([_renamed(violation, renamed) for violation in error.fields])


def _renamed(violation: FieldViolation, renamed: Callable[[str], str]) -> FieldViolation:
    return FieldViolation(
        renamed(violation.field), violation.reason, violation.constraint, violation.message, violation.value
    )


def _root(name: str) -> str:
    return name.split(".")[0].split("[")[0]
