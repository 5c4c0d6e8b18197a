"""The compiler of response formats over the real library: what it refuses and why, whatever the author meant (R31)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest

from tokenwire import _native
from tokenwire.engine.grammars import find_grammar_compiler

# Every byte is a token, and two tokens end a generation.
VOCABULARY = [b"", b"</s>", *(bytes([value]) for value in range(256))]


@pytest.fixture(scope="module")
def compiler() -> Any:
    make = find_grammar_compiler(VOCABULARY, [0, 1])
    assert make is not None
    return make()


def schema(**fields: Any) -> str:
    return json.dumps(fields)


GOOD = {
    "regex": [
        "a",
        "(yes|no)",
        r"\d{4}-\d\d",
        "",
        "^+a",
        "foo**",
        "a{2000,}",
        "((a{100}){100}){100}",
        "(.*a){50}",
        "[^é]*",
    ],
    "json_schema": [
        "{}",
        schema(type="object"),
        schema(enum=[f"value-{n}" for n in range(500)]),
        schema(type="string", minLength=50_000),
        schema(type="array", items={"type": "string"}, minItems=10_000),
        '{"type":"array","items":' * 60 + "{}" + "}" * 60,
    ],
}

BAD = {
    "regex": ["(" * 60_000, "(" * 30_000 + "a" + ")" * 30_000, r"(a)\1", "(?=a)b", "[z-a]", "*", "a{2,1}"],
    "json_schema": [
        "false",
        "[]",
        "12",
        "{",
        schema(type="integer", minimum=5, maximum=3),
        schema(**{"$ref": "#"}),
        schema(**{"$ref": "http://example.com/x.json"}),
        schema(**{"$ref": "file:///etc/passwd"}),
        schema(**{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        schema(type="object", dependentSchemas={"a": {}}),
        schema(**{"not": {"type": "string"}}),
        schema(type="nothing"),
        schema(**{"$ref": "\u202e\u0007/x"}),
        schema(
            allOf=[{"anyOf": [{"properties": {f"p{i}{j}": {"pattern": f"^a{j}"}}} for j in range(6)]} for i in range(9)]
        ),
        '{"type":"array","items":' * 2000 + "{}" + "}" * 2000,
    ],
}


@pytest.mark.parametrize("kind", ["regex", "json_schema"])
def test_what_is_well_formed_compiles_soon(compiler: Any, kind: str) -> None:
    for text in GOOD[kind]:
        began = time.monotonic()
        compiler.compile(kind, text)
        assert time.monotonic() - began < 10, text[:80]


@pytest.mark.parametrize("kind", ["regex", "json_schema"])
def test_what_is_not_says_why_in_one_short_line(compiler: Any, kind: str) -> None:
    for text in BAD[kind]:
        began = time.monotonic()
        with pytest.raises(_native.EngineError) as caught:
            compiler.compile(kind, text)
        message = str(caught.value)
        assert caught.value.code == "INVALID_REQUEST", text[:80]
        assert 0 < len(message) <= 203, message
        assert message.isascii(), message
        assert message.isprintable(), message
        assert "panic" not in message
        assert time.monotonic() - began < 10, text[:80]


def test_an_unknown_kind_is_refused(compiler: Any) -> None:
    with pytest.raises(_native.EngineError):
        compiler.compile("perl", "a")


def test_the_library_is_the_version_that_this_knows(compiler: Any) -> None:
    assert compiler.version.startswith("llguidance@1.9.")


@pytest.mark.parametrize("library", ["/nonexistent.so", _native.__file__])
def test_a_library_that_cannot_be_used_is_said(library: str) -> None:
    with pytest.raises(_native.EngineError, match="llguidance") as caught:
        _native.GrammarCompiler(library, VOCABULARY, [0])
    assert caught.value.code == "UNAVAILABLE"
    assert "/" not in str(caught.value)


MEMORY_SCRIPT = """
import sys
from pathlib import Path
from tokenwire.engine.grammars import find_grammar_compiler

def resident_kib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4

compiler = find_grammar_compiler([b"", b"", *(bytes([value]) for value in range(256))], [0, 1])()
for turn in range(2):
    before = resident_kib()
    for n in range(500):
        compiler.compile("regex", f"[a-z]{{{n % 50}}}{turn}x{n}")
print(resident_kib() - before)
"""


def test_many_formats_leave_no_memory_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, timeout=100, check=True
    )
    assert int(done.stdout) < 2048, f"{done.stdout} KiB more after 500 formats"
