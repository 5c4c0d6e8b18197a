"""Runs chat templates in a process of their own: see render_child.py for why."""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenwire.text.errors import ChatTemplateError

MAX_TEMPLATE_CHARS = 256 << 10
MAX_OUTPUT_CHARS = 4 << 20
CPU_SECONDS = 0.5
WALL_SECONDS = 10.0
"""Only for a process that does not run at all; one that runs is ended by its processor time."""
MEMORY_BYTES = 128 << 20

_CHILD = Path(__file__).with_name("render_child.py")


class TemplateRenderer:
    """A chat template, ready to render. One process serves all threads, one rendering at a time.

    The process is started on construction, which does not wait for it, and again after a rendering that had to be
    killed; a rendering costs a fraction of a millisecond beside it.

    Attributes:
        constants: the string constants of the template, ascending, once it is ready.

    Raises:
        ChatTemplateError: the template is too long, or its process cannot be started.
    """

    def __init__(self, template: str) -> None:
        if len(template) > MAX_TEMPLATE_CHARS:
            message = f"the chat template has {len(template)} characters, the limit is {MAX_TEMPLATE_CHARS}"
            raise ChatTemplateError("template_too_long", message)
        self._template = template
        self._lock = threading.Lock()
        # At most one. The list outlives this object, so that a renderer that nobody closed still ends its process.
        self._processes: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _end, self._processes)
        self._closed = False
        self._is_ready = False
        self.constants: list[str] = []
        self._launch()

    def wait_until_ready(self) -> None:
        """Raises what is wrong with the template, which a rendering would too.

        Raises:
            ChatTemplateError: the template does not compile.
        """
        with self._lock:
            self._make_ready()

    def render(self, variables: Sequence[Mapping[str, object]]) -> list[str]:
        """One text for each set of variables, all within one limit of time.

        Raises:
            ChatTemplateError: the template refused, failed, or cost too much.
        """
        with self._lock:
            if self._closed:
                raise ChatTemplateError("template_closed", "the chat template was closed")
            self._make_ready()
            texts = self._ask({"variables": list(variables)}).get("texts")
        if not isinstance(texts, list):
            raise ChatTemplateError("template_failed", "the template process sent an unexpected answer")
        return texts

    def close(self) -> None:
        """Ends the process. Idempotent."""
        with self._lock:
            self._closed = True
            self._kill()

    def _make_ready(self) -> None:
        if not self._processes:
            self._launch()
        if not self._is_ready:
            self.constants = self._prepare()
            self._is_ready = True

    def _launch(self) -> None:
        self._is_ready = False
        try:
            # No environment beyond what finds the interpreter's libraries: the template's process needs no secret.
            kept = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "HOME", "TZ", "LANG")
            process = subprocess.Popen(
                [sys.executable, str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in kept if name in os.environ},
                bufsize=0,
            )
            self._processes.append(process)
        except OSError as error:
            raise ChatTemplateError("template_process", "the template process cannot be started") from error

    def _prepare(self) -> list[str]:
        """Gives a process that was launched the template; returns its constants."""
        setup = {
            "template": self._template,
            "memory_bytes": MEMORY_BYTES,
            "cpu_seconds": CPU_SECONDS,
            "max_output_chars": MAX_OUTPUT_CHARS,
        }
        try:
            constants = self._ask(setup).get("constants")
            if not isinstance(constants, list):
                raise ChatTemplateError("template_failed", "the template process sent an unexpected answer")
        except BaseException:
            self._kill()
            raise
        return constants

    def _ask(self, message: Mapping[str, object]) -> dict[str, object]:
        """Sends one message and returns the answer; a process that does not answer is killed."""
        deadline = time.monotonic() + WALL_SECONDS
        data = json.dumps(message).encode()
        try:
            self._write(struct.pack("<I", len(data)) + data, deadline)
            (size,) = struct.unpack("<I", self._read(4, deadline))
            # JSON spells a character in at most 12 bytes.
            if size > 12 * 2 * MAX_OUTPUT_CHARS + 4096:
                raise EOFError
            answer = json.loads(self._read(size, deadline))
        except (EOFError, TimeoutError, OSError, ValueError) as error:
            self._kill()
            raise ChatTemplateError("template_too_costly", "the chat template took too much time or memory") from error
        if not isinstance(answer, dict):
            self._kill()
            raise ChatTemplateError("template_failed", "the template process sent an unexpected answer")
        failure = answer.get("error")
        if isinstance(failure, dict):
            check, text = str(failure.get("check")), str(failure.get("message"))
            if check == "template_refused" and text not in self.constants:
                # A message put together at run time may hold text of the conversation.
                text = "it refuses this conversation"
            raise ChatTemplateError(check, f"the chat template failed: {text}")
        return answer

    def _write(self, data: bytes, deadline: float) -> None:
        fd = self._fd("stdin")
        view = memoryview(data)
        while view:
            _wait(fd, select.POLLOUT, deadline)
            # A pipe that is ready for writing takes this much without blocking.
            view = view[os.write(fd, view[: select.PIPE_BUF]) :]

    def _read(self, size: int, deadline: float) -> bytes:
        fd = self._fd("stdout")
        chunks = []
        while size > 0:
            _wait(fd, select.POLLIN, deadline)
            chunk = os.read(fd, min(size, 1 << 16))
            if not chunk:
                raise EOFError
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)

    def _fd(self, name: str) -> int:
        if not self._processes:
            raise EOFError
        return int(getattr(self._processes[0], name).fileno())

    def _kill(self) -> None:
        _end(self._processes)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        process = processes.pop()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _wait(fd: int, event: int, deadline: float) -> None:
    # poll, as select fails beyond 1,024 descriptors.
    poller = select.poll()
    poller.register(fd, event)
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
