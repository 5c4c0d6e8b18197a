"""Compiled formats: shared, kept, bounded in number and in time. The compiler here is one that a test holds back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from tokenwire.engine.grammars import MAX_PENDING, GrammarError, Grammars, NoGrammarsError
from tokenwire.errors import TokenwireError
from tokenwire.rpc.response_format import ResponseFormat, compile_format


class Refused(Exception):
    code = "INVALID_REQUEST"


class Compiler:
    """Compiles to (kind, text), once `gate` is open; refuses what begins with `bad`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.compiled: list[str] = []

    def compile(self, kind: str, text: str) -> object:
        self.entered.release()
        assert self.gate.wait(20)
        self.compiled.append(text)
        if text.startswith("bad"):
            raise Refused(text)
        return (kind, text)


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
async def grammars(compiler: Compiler) -> AsyncIterator[Grammars]:
    made = Grammars(lambda: compiler, timeout_s=20, max_entries=2)
    yield made
    compiler.gate.set()
    made.close()


async def test_equal_formats_are_compiled_once(compiler: Compiler, grammars: Grammars) -> None:
    assert await grammars.get("regex", "a") == ("regex", "a")
    assert await asyncio.gather(*(grammars.get("regex", "b") for _ in range(5))) == [("regex", "b")] * 5
    assert await grammars.get("json_schema", "a") == ("json_schema", "a")
    assert compiler.compiled == ["a", "b", "a"]


async def test_the_latest_are_kept(compiler: Compiler, grammars: Grammars) -> None:
    for text in ("a", "b", "a", "c", "a", "b"):
        await grammars.get("regex", text)
    assert compiler.compiled == ["a", "b", "c", "b"]
    for n in range(1000):
        await grammars.get("regex", str(n))
    assert grammars.num_kept == 2


@pytest.mark.parametrize(("text", "too_complex"), [("bad syntax", False), ("bad: too many states", True)])
async def test_what_cannot_be_compiled_says_why_each_time(
    compiler: Compiler, grammars: Grammars, text: str, too_complex: bool
) -> None:
    for _ in range(2):
        with pytest.raises(GrammarError, match=text) as caught:
            await grammars.get("regex", text)
        assert caught.value.too_complex == too_complex
    assert grammars.num_kept == 0


async def test_a_format_that_takes_too_long_is_too_complex_and_holds_up_no_loop(compiler: Compiler) -> None:
    grammars = Grammars(lambda: compiler, timeout_s=0.2, max_entries=2)
    compiler.gate.clear()
    waiting = asyncio.ensure_future(grammars.get("regex", "slow"))
    assert await asyncio.to_thread(compiler.entered.acquire, timeout=20)
    # A format that never got its turn is not the one to blame.
    with pytest.raises(TokenwireError, match="OVERLOADED"):
        await grammars.get("regex", "innocent")
    with pytest.raises(GrammarError, match="takes longer") as caught:
        await waiting
    assert caught.value.too_complex
    compiler.gate.set()
    assert await asyncio.to_thread(compiler.entered.acquire, timeout=20)
    grammars.close()


async def test_waiting_formats_are_bounded(compiler: Compiler, grammars: Grammars) -> None:
    compiler.gate.clear()
    waiting = [asyncio.ensure_future(grammars.get("regex", str(n))) for n in range(MAX_PENDING)]
    await asyncio.sleep(0)
    with pytest.raises(TokenwireError, match="OVERLOADED"):
        await grammars.get("regex", "one more")
    again = asyncio.ensure_future(grammars.get("regex", "3"))  # waits with its equal
    await asyncio.sleep(0)
    compiler.gate.set()
    assert await again == ("regex", "3")
    await asyncio.gather(*waiting)


async def test_a_library_that_cannot_be_used_is_said_for_every_format() -> None:
    class UnusableError(Exception):
        code = "UNAVAILABLE"

    def make() -> Compiler:
        raise UnusableError("llguidance is 2.0, not 1.9")

    grammars = Grammars(make, timeout_s=20, max_entries=2)
    for _ in range(2):
        with pytest.raises(NoGrammarsError, match="llguidance is"):
            await grammars.get("regex", "a")
        grammar, found = await compile_format(ResponseFormat("regex", "a"), 100, grammars)
        assert grammar is None
        assert [(each.field, each.reason) for each in found] == [("response_format.regex", "UNSUPPORTED")]
    grammars.close()


async def test_a_caller_that_leaves_does_not_take_the_format_from_others(
    compiler: Compiler, grammars: Grammars
) -> None:
    compiler.gate.clear()
    leaving, staying = (asyncio.ensure_future(grammars.get("regex", "a")) for _ in range(2))
    assert await asyncio.to_thread(compiler.entered.acquire, timeout=20)
    leaving.cancel()
    compiler.gate.set()
    assert await staying == ("regex", "a")
    with pytest.raises(asyncio.CancelledError):
        await leaving
