"""Every bound of a request, once: what the validator checks, docs/limits.md shows and `tokenwire info` prints.

Bounds that an operator may set live in config.py and are named here by their setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokenwire.config import Settings

JOB_ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
ATTACH_TOKEN_PATTERN = re.compile(r"[A-Za-z0-9_-]{16,128}", re.ASCII)
ROLES = ("system", "user", "assistant")
MAX_STOPS = 4
MAX_STOP_TOKENS = 32
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100
MAX_SEED = 2**64 - 1
MAX_CACHE_SALT_CHARS = 128
MAX_GRAMMAR_DEPTH = 64
"""Objects and arrays inside one another in a JSON schema."""

GRAMMARS = ("json_schema", "regex")
"""Fields of `response_format`, of which a request sets one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Bounds of one number. `high` may name what it depends on: a setting, or the model's `vocab_size`.

    Attributes:
        open_low: whether `low` itself is refused.
        default: what an unset field means, for the documentation.
    """

    field: str
    low: int
    high: int | str
    default: str
    open_low: bool = False

    def most(self, limits: object) -> int:
        """The highest value under `limits`, an object with the attribute that `high` names."""
        return int(getattr(limits, self.high)) if isinstance(self.high, str) else self.high

    def constraint(self, high: int) -> str:
        return f"range({'>' if self.open_low else ''}{self.low}..={high})"


RULES = (
    Rule("max_tokens", 1, "max_tokens_out", "the highest allowed, capped by the context that the prompt leaves"),
    Rule("temperature", 0, 2, "1; 0 is greedy"),
    Rule("top_p", 0, 1, "1 (off)", open_low=True),
    Rule("top_k", 0, "vocab_size", "0 (off)"),
    Rule("min_p", 0, 1, "0 (off)"),
    Rule("repetition_penalty", 0, 2, "1 (off)", open_low=True),
    Rule("frequency_penalty", -2, 2, "0 (off)"),
    Rule("presence_penalty", -2, 2, "0 (off)"),
    Rule("logprobs", 0, 20, "no log-probabilities"),
    Rule("seed", 0, MAX_SEED, "drawn by the worker"),
    Rule("priority", -2, 2, "0"),
)

TRANSPORT_SETTINGS = (
    "max_message_bytes",
    "max_concurrent_streams",
    "max_connections",
    "max_metadata_bytes",
    "keepalive_time_ms",
    "keepalive_timeout_ms",
    "min_ping_interval_ms",
    "max_connection_idle_ms",
    "max_connection_age_ms",
    "handshake_timeout_ms",
)


def number_bounds(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """Field, least, most and what unset means, of every number in a request."""
    for rule in RULES:
        if rule.high == "vocab_size":
            most = "the vocabulary's size"
        elif isinstance(rule.high, str):
            most = f"`{rule.high}` ({getattr(settings, rule.high)})"
        else:
            most = "2^64 − 1" if rule.high == MAX_SEED else str(rule.high)
        least = f"above {rule.low}" if rule.open_low else str(rule.low).replace("-", "−")
        yield f"`{rule.field}`", least, most, rule.default


def other_bounds(settings: Settings) -> Iterator[tuple[str, str]]:
    """Field and bound, of everything else in a request."""

    def setting(name: str) -> str:
        value = getattr(settings, name)
        return f"`{name}` ({value:g})" if isinstance(value, float) else f"`{name}` ({value})"

    yield "`job_id`", "1–128 characters of `A-Za-z0-9._:-`, unique among live jobs"
    yield "input", "exactly one of `prompt`, `prompt_tokens`, `chat`"
    yield (
        "`prompt`, all `chat` contents together",
        f"{setting('max_prompt_chars')} Unicode characters, at least one token",
    )
    yield "`chat.messages`", f"{setting('max_chat_messages')}; roles {', '.join(f'`{role}`' for role in ROLES)}"
    yield "`prompt_tokens`", "at least one id, each inside the vocabulary"
    yield (
        "prompt tokens + `max_tokens`",
        "the context length; prompt tokens alone also `max_tokens_in`, where it is set",
    )
    yield "`stop`", f"{MAX_STOPS} non-empty strings of at most {MAX_STOP_TOKENS} tokens each"
    yield (
        "`logit_bias`",
        f"{MAX_LOGIT_BIASES} entries, ids inside the vocabulary, each −{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}",
    )
    yield "`cache_salt`", f"1–{MAX_CACHE_SALT_CHARS} characters"
    yield (
        "`response_format`",
        f"exactly one of {', '.join(f'`{name}`' for name in GRAMMARS)}; {setting('max_grammar_bytes')} bytes; "
        f"a schema's values {MAX_GRAMMAR_DEPTH} deep; compiled within {setting('grammar_timeout_ms')} milliseconds",
    )
    yield "`attach_token`", "16–128 characters of `A-Za-z0-9_-`, with `detach` only"
    yield (
        "time",
        f"{setting('inference_timeout_sec')} seconds, or the call's deadline if that is sooner; from arrival, queueing "
        "included",
    )


def transport_bounds(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Setting, value and meaning, of every bound on messages and connections."""
    for name in TRANSPORT_SETTINGS:
        yield f"`{name}`", str(getattr(settings, name)), Settings.model_fields[name].description or ""


def markdown_tables(settings: Settings) -> dict[str, str]:
    """The tables of docs/limits.md, by the name of the marker that each stands behind."""
    return {
        "numbers": _table(("Field", "Least", "Most", "Unset means"), number_bounds(settings)),
        "others": _table(("Field", "Bound"), other_bounds(settings)),
        "transport": _table(("Setting", "Default", ""), transport_bounds(settings)),
    }


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"
