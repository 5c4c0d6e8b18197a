"""Compiled response formats: made on a thread of their own, shared by equal requests, the latest kept."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from tokenwire import _native
from tokenwire.errors import TokenwireError

MAX_PENDING = 16
"""Formats that may wait to be compiled; beyond that a request with a new one is OVERLOADED."""


class GrammarError(Exception):
    """A format that cannot be compiled. `str()` is one line for its author.

    Attributes:
        too_complex: it is well formed, but asks for more work or memory than it may.
    """

    def __init__(self, message: str, *, too_complex: bool) -> None:
        super().__init__(message)
        self.too_complex = too_complex


class NoGrammarsError(Exception):
    """The installed llguidance cannot be used. `str()` is one line that says why."""


class NativeGrammarCompiler(Protocol):
    """What is used of `_native.GrammarCompiler`; a failure to compile carries the code INVALID_REQUEST."""

    def compile(self, kind: str, text: str) -> object: ...


CompilerFactory = Callable[[], NativeGrammarCompiler]


def find_grammar_compiler(vocabulary: Sequence[bytes], stop_token_ids: Sequence[int]) -> CompilerFactory | None:
    """Makes a compiler for one vocabulary, which takes up to seconds; None if llguidance is not installed."""
    found = importlib.util.find_spec("llguidance")
    places = [Path(place) / "_lib.abi3.so" for place in (found.submodule_search_locations or ())] if found else []
    library = next((place for place in places if place.is_file()), None)
    if library is None:
        return None
    return lambda: _native.GrammarCompiler(str(library), vocabulary, stop_token_ids)


class Grammars:
    """Compiles formats and keeps the latest. All methods belong to the event loop's thread.

    Args:
        make_compiler: called on the compiling thread, once the first format is wanted.
        timeout_s: longest a request waits for its format.
        max_entries: formats that are kept.
    """

    def __init__(self, make_compiler: CompilerFactory, *, timeout_s: float, max_entries: int) -> None:
        self._make_compiler = make_compiler
        self._compiler: NativeGrammarCompiler | None = None
        self._timeout_s = timeout_s
        self._max_entries = max_entries
        self._kept: OrderedDict[tuple[str, str], object] = OrderedDict()
        self._pending: dict[tuple[str, str], tuple[asyncio.Future[object], threading.Event]] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    async def get(self, kind: str, text: str) -> object:
        """The compiled format, for `_native.Engine.submit`.

        Raises:
            GrammarError: it cannot be compiled, or not in time.
            NoGrammarsError: nothing can be compiled here.
            TokenwireError: OVERLOADED if too many others are being compiled.
        """
        key = (kind, text)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        future, begun = self._pending.get(key) or self._begin(key)
        done, _ = await asyncio.wait([future], timeout=self._timeout_s)
        if done:
            return future.result()
        if begun.is_set():
            raise GrammarError(f"takes longer than {self._timeout_s:g} s to compile", too_complex=True)
        raise TokenwireError("OVERLOADED", "too many response formats are being compiled")

    def close(self) -> None:
        """Drops what waits. A format that is being compiled is left to itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, key: tuple[str, str]) -> tuple[asyncio.Future[object], threading.Event]:
        if len(self._pending) >= MAX_PENDING:
            raise TokenwireError("OVERLOADED", "too many response formats are being compiled")
        begun = threading.Event()
        future = asyncio.get_running_loop().run_in_executor(self._pool, self._compile, key, begun)
        self._pending[key] = future, begun
        future.add_done_callback(lambda done: self._keep(key, done))
        return future, begun

    def _keep(self, key: tuple[str, str], future: asyncio.Future[object]) -> None:
        del self._pending[key]
        if future.cancelled() or future.exception() is not None:
            return
        self._kept[key] = future.result()
        while len(self._kept) > self._max_entries:
            self._kept.popitem(last=False)

    def _compile(self, key: tuple[str, str], begun: threading.Event) -> object:
        """On the compiling thread."""
        begun.set()
        try:
            if self._compiler is None:
                self._compiler = self._make_compiler()
            return self._compiler.compile(*key)
        except Exception as error:
            code, message = getattr(error, "code", ""), str(error)
            if code == "UNAVAILABLE":
                raise NoGrammarsError(message) from error
            if code == "OVERLOADED":
                raise TokenwireError(code, message) from error
            if code != "INVALID_REQUEST":
                raise
            raise GrammarError(message, too_complex="too " in message or "limit" in message) from error
