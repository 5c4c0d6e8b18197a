"""A request's response format: what can be said of it without compiling it, and compiling it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from tokenwire.bounds import GRAMMARS, MAX_GRAMMAR_DEPTH
from tokenwire.engine.grammars import GrammarError, Grammars, NoGrammarsError
from tokenwire.errors import FieldViolation

# How the answer to a JSON schema is spaced, unless the schema says otherwise: without a rule, a model may go on with
# white space for ever.
_GUIDANCE = "x-guidance"
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The formal language that the answer must belong to.

    Attributes:
        kind: one of `GRAMMARS`, or empty if the client set none of them.
        text: the grammar in that kind's own syntax.
    """

    kind: str
    text: str

    @property
    def field(self) -> str:
        return f"response_format.{self.kind}" if self.kind else "response_format"

    def violation(self, reason: str, constraint: str, message: str, value: str | None = None) -> FieldViolation:
        return FieldViolation(self.field, reason, constraint, message, value)


def check_format(wanted: ResponseFormat | None, max_bytes: int) -> Iterator[FieldViolation]:
    """Its violations, as far as they show without compiling."""
    if wanted is None:
        return
    if wanted.kind not in GRAMMARS:
        names = ", ".join(GRAMMARS)
        yield wanted.violation("ONE_OF", f"one_of({names})", f"give exactly one of {names}")
        return
    size = len(wanted.text.encode("utf-8", "replace"))
    if size > max_bytes:
        message = f"must have at most {max_bytes} bytes"
        yield wanted.violation("GRAMMAR_TOO_COMPLEX", f"bytes(1..={max_bytes})", message, str(size))
    elif not wanted.text:
        yield wanted.violation("NON_EMPTY", "non_empty", "must not be empty")
    elif "\0" in wanted.text:
        yield wanted.violation("GRAMMAR_INVALID", "no_nul", "must not hold U+0000; write it as an escape")
    elif wanted.kind == "regex" and (len(wanted.text) - len(wanted.text.rstrip("\\"))) % 2:
        yield wanted.violation("GRAMMAR_INVALID", "escape", "must not end in the middle of an escape")
    elif wanted.kind == "json_schema":
        yield from _check_schema(wanted)


async def compile_format(
    wanted: ResponseFormat | None, max_bytes: int, grammars: Grammars | None
) -> tuple[object | None, list[FieldViolation]]:
    """The compiled format for the engine, or what is wrong with it; neither if `check_format` has violations to tell.

    Raises:
        TokenwireError: OVERLOADED.
    """
    if wanted is None:
        return None, []
    if grammars is None:
        return None, [wanted.violation("UNSUPPORTED", "unset", "this worker has no structured output")]
    if any(check_format(wanted, max_bytes)):
        return None, []
    try:
        return await grammars.get(wanted.kind, grammar_text(wanted)), []
    except NoGrammarsError as error:
        return None, [wanted.violation("UNSUPPORTED", "unset", f"this worker has no structured output: {error}")]
    except GrammarError as error:
        reason = "GRAMMAR_TOO_COMPLEX" if error.too_complex else "GRAMMAR_INVALID"
        return None, [wanted.violation(reason, "compiles", f"cannot be compiled: {error}")]


def grammar_text(wanted: ResponseFormat) -> str:
    """What is compiled for a format in which `check_format` found nothing."""
    if wanted.kind != "json_schema":
        return wanted.text
    return json.dumps({_GUIDANCE: _SPACING, **json.loads(wanted.text)})


def _check_schema(wanted: ResponseFormat) -> Iterator[FieldViolation]:
    too_deep = wanted.violation(
        "GRAMMAR_TOO_COMPLEX", f"depth({MAX_GRAMMAR_DEPTH})", f"must not nest more than {MAX_GRAMMAR_DEPTH} deep"
    )
    try:
        schema = json.loads(wanted.text)
    except RecursionError:
        yield too_deep
        return
    except ValueError:
        yield wanted.violation("GRAMMAR_INVALID", "json", "must be JSON")
        return
    if not isinstance(schema, dict):
        yield wanted.violation("GRAMMAR_INVALID", "object", "must be a JSON object")
    elif _depth(schema) > MAX_GRAMMAR_DEPTH:
        yield too_deep


def _depth(value: object) -> int:
    """How many objects and arrays stand inside one another; looks no further than what is too deep."""
    depth = 0
    level = [value]
    while depth <= MAX_GRAMMAR_DEPTH:
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            break
        depth += 1
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
