"""Every bound of a request, checked in one place on plain values, so that gRPC and HTTP give the same answer.

The bounds themselves are in `tokenwire.bounds`. All violations are found at once, cheap ones first, and none repeats
the prompt, a stop string or a salt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tokenwire.bounds import (
    ATTACH_TOKEN_PATTERN,
    JOB_ID_PATTERN,
    MAX_CACHE_SALT_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    ROLES,
    RULES,
)
from tokenwire.errors import FieldViolation, invalid_request
from tokenwire.rpc.response_format import ResponseFormat, check_format

# Violations beyond this many in one list are not collected: a status carries fewer anyway.
_MAX_PER_LIST = 32


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that depend on settings or on the model.

    Attributes:
        max_tokens_in: most prompt tokens; 0 for no bound but the context.
        max_token_bytes: length of the longest vocabulary entry, bytes.
        max_grammar_bytes: longest response format, bytes.
    """

    max_prompt_chars: int
    max_chat_messages: int
    max_tokens_in: int
    max_tokens_out: int
    vocab_size: int
    context_length: int
    max_token_bytes: int
    max_grammar_bytes: int = 65536


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A generation as the client sent it; None is unset. Exactly one of the three inputs should be given."""

    job_id: str
    prompt: str | None = None
    prompt_tokens: Sequence[int] | None = None
    chat: Sequence[tuple[str, str]] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    detach: bool = False
    attach_token: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None


def check_request(
    request: RawRequest,
    limits: Limits,
    count_tokens: Callable[[str], int],
    also: Iterable[FieldViolation] = (),
) -> None:
    """Checks everything but the fit into the context (context.py), and whether a response format can be compiled.

    Args:
        count_tokens: tokens of a text by the model's tokenizer; called on stop strings only, once they are known short.
        also: violations found elsewhere, to be reported with the others.

    Raises:
        TokenwireError: INVALID_REQUEST with every violation.
    """
    violations = [
        *_check_job_id(request.job_id),
        *_check_input(request, limits),
        *_check_numbers(request, limits),
        *_check_stops(request.stop, limits, count_tokens),
        *_check_logit_bias(request.logit_bias, limits),
        *_check_detach(request),
        *_check_cache_salt(request.cache_salt),
        *check_format(request.response_format, limits.max_grammar_bytes),
        *also,
    ]
    if violations:
        raise invalid_request(violations)


def check_job_id(job_id: str) -> None:
    """For calls that carry nothing but a job id.

    Raises:
        TokenwireError: INVALID_REQUEST.
    """
    violations = list(_check_job_id(job_id))
    if violations:
        raise invalid_request(violations)


def check_attach(job_id: str, attach_token: str) -> None:
    """What Attach carries.

    Raises:
        TokenwireError: INVALID_REQUEST.
    """
    violations = [*_check_job_id(job_id), *_check_attach_token(attach_token)]
    if violations:
        raise invalid_request(violations)


def empty_prompt(name: str) -> FieldViolation:
    """For the field of a prompt that holds nothing."""
    return FieldViolation(name, "PROMPT_EMPTY", "non_empty", "must not be empty")


def _check_job_id(job_id: str) -> Iterator[FieldViolation]:
    if not JOB_ID_PATTERN.fullmatch(job_id):
        message = "must be 1 to 128 characters of A-Z, a-z, 0-9, '.', '_', ':' or '-'"
        yield FieldViolation("job_id", "PATTERN", f"pattern({JOB_ID_PATTERN.pattern})", message)


def _check_attach_token(token: str) -> Iterator[FieldViolation]:
    if not ATTACH_TOKEN_PATTERN.fullmatch(token):
        message = "must be 16 to 128 characters of A-Z, a-z, 0-9, '_' or '-'"
        yield FieldViolation("attach_token", "PATTERN", f"pattern({ATTACH_TOKEN_PATTERN.pattern})", message)


def _check_detach(request: RawRequest) -> Iterator[FieldViolation]:
    if request.attach_token is not None:
        if not request.detach:
            yield FieldViolation("attach_token", "REQUIRES", "requires(detach)", "has no meaning without detach")
        yield from _check_attach_token(request.attach_token)


def _check_input(request: RawRequest, limits: Limits) -> Iterator[FieldViolation]:
    inputs = {"prompt": request.prompt, "prompt_tokens": request.prompt_tokens, "chat": request.chat}
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        for name in given or inputs:
            yield FieldViolation(name, "ONE_OF", "one_of(prompt, prompt_tokens, chat)", "give exactly one input")
    if request.prompt is not None:
        if not request.prompt:
            yield empty_prompt("prompt")
        yield from _check_chars("prompt", len(request.prompt), limits)
    if request.prompt_tokens is not None:
        yield from _check_token_ids(request.prompt_tokens, limits)
    if request.chat is not None:
        yield from _check_chat(request.chat, limits)


def _check_chars(name: str, chars: int, limits: Limits) -> Iterator[FieldViolation]:
    limit = limits.max_prompt_chars
    if chars > limit:
        yield FieldViolation(
            name, "PROMPT_TOO_LARGE", f"length(1..={limit})", f"must have at most {limit} characters", str(chars)
        )


def _check_token_ids(ids: Sequence[int], limits: Limits) -> Iterator[FieldViolation]:
    if not ids:
        yield empty_prompt("prompt_tokens")
    elif max(ids) >= limits.vocab_size or min(ids) < 0:
        wrong = [(place, token) for place, token in enumerate(ids) if not 0 <= token < limits.vocab_size]
        for place, token in wrong[:_MAX_PER_LIST]:
            yield _outside_vocabulary(f"prompt_tokens.ids[{place}]", token, limits)


def _check_chat(chat: Sequence[tuple[str, str]], limits: Limits) -> Iterator[FieldViolation]:
    if not chat:
        yield empty_prompt("chat.messages")
    if len(chat) > limits.max_chat_messages:
        yield _too_many("chat.messages", limits.max_chat_messages)
        return
    wrong = [place for place, (role, _) in enumerate(chat) if role not in ROLES]
    for place in wrong[:_MAX_PER_LIST]:
        yield FieldViolation(
            f"chat.messages[{place}].role",
            "ONE_OF",
            f"one_of({', '.join(ROLES)})",
            f"must be one of {', '.join(ROLES)}",
        )
    yield from _check_chars("chat.messages", sum(len(content) for _, content in chat), limits)


def _check_numbers(request: RawRequest, limits: Limits) -> Iterator[FieldViolation]:
    for rule in RULES:
        value: int | float | None = getattr(request, rule.field)
        if value is None:
            continue
        high = rule.most(limits)
        constraint = rule.constraint(high)
        if isinstance(value, float) and not math.isfinite(value):
            yield FieldViolation(rule.field, "FINITE", constraint, "must be a finite number", str(value))
        elif value < rule.low or value > high or (rule.open_low and value == rule.low):
            least = f"above {rule.low}" if rule.open_low else f"at least {rule.low}"
            message = f"must be {least} and at most {high}, not {_show(value)}"
            yield FieldViolation(rule.field, "RANGE", constraint, message, _show(value))


def _check_stops(stops: Sequence[str], limits: Limits, count_tokens: Callable[[str], int]) -> Iterator[FieldViolation]:
    if len(stops) > MAX_STOPS:
        yield _too_many("stop", MAX_STOPS)
        return
    constraint = f"tokens(1..={MAX_STOP_TOKENS})"
    for place, stop in enumerate(stops):
        name = f"stop[{place}]"
        if not stop:
            yield FieldViolation(name, "NON_EMPTY", "non_empty", "must not be empty")
        # The bound in bytes keeps a huge string away from the tokenizer: no 32 tokens spell more than this.
        elif (
            len(stop.encode("utf-8", "replace")) > MAX_STOP_TOKENS * limits.max_token_bytes
            or count_tokens(stop) > MAX_STOP_TOKENS
        ):
            yield FieldViolation(name, "LENGTH", constraint, f"must have at most {MAX_STOP_TOKENS} tokens")


def _check_logit_bias(biases: Mapping[int, float], limits: Limits) -> Iterator[FieldViolation]:
    if len(biases) > MAX_LOGIT_BIASES:
        yield _too_many("logit_bias", MAX_LOGIT_BIASES)
        return
    for token in sorted(biases):
        name = f"logit_bias[{token}]"
        if not 0 <= token < limits.vocab_size:
            yield _outside_vocabulary(name, token, limits)
        bias = biases[token]
        constraint = f"range(-{MAX_LOGIT_BIAS}..={MAX_LOGIT_BIAS})"
        if not math.isfinite(bias):
            yield FieldViolation(name, "FINITE", constraint, "must be a finite number", str(bias))
        elif abs(bias) > MAX_LOGIT_BIAS:
            message = f"must be at least -{MAX_LOGIT_BIAS} and at most {MAX_LOGIT_BIAS}, not {bias:.7g}"
            yield FieldViolation(name, "RANGE", constraint, message, f"{bias:.7g}")


def _check_cache_salt(salt: str | None) -> Iterator[FieldViolation]:
    if salt is not None and not 1 <= len(salt) <= MAX_CACHE_SALT_CHARS:
        message = f"must have 1 to {MAX_CACHE_SALT_CHARS} characters"
        yield FieldViolation("cache_salt", "LENGTH", f"length(1..={MAX_CACHE_SALT_CHARS})", message, str(len(salt)))


def _show(value: int | float) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    return str(value) if value.bit_length() <= 128 else "a number of more than 128 bits"


def _outside_vocabulary(name: str, token: int, limits: Limits) -> FieldViolation:
    constraint = f"vocabulary(0..{limits.vocab_size})"
    message = f"token id {token} is outside the vocabulary of {limits.vocab_size}"
    return FieldViolation(name, "VOCABULARY", constraint, message, str(token))


def _too_many(name: str, limit: int) -> FieldViolation:
    return FieldViolation(name, "MAX_COUNT", f"max_count({limit})", f"must have at most {limit} entries")
