"""The process that renders chat templates: run as a script by `renderer.py`, and as nothing else.

A chat template is a program from a model file. The sandbox keeps it from the interpreter's inside but not from using
time or memory, so it runs here, where it may be killed: under limits of memory, processor time and output, with no way
to open a file or a socket, started fresh, and holding nothing but the conversation that it renders.

Messages are JSON with a 4-byte little-endian length before it. The first one sets the template and the limits, and is
answered by the string constants in the template; each later one asks for renderings, answered by their texts.

This file imports nothing from the package, so that the process stays small and starts fast.
"""

import datetime
import encodings.unicode_escape  # noqa: F401  (see warm_up)
import json
import os
import pprint  # noqa: F401
import resource
import signal
import struct
import sys
import textwrap  # noqa: F401
from typing import Any, NoReturn

# Names of the package's modules beside this script must not hide anybody else's.
_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  (pathlib would double the imports)
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]  # noqa: PTH100

import jinja2  # noqa: E402
import jinja2.debug  # noqa: E402
import jinja2.exceptions  # noqa: E402
import jinja2.ext  # noqa: E402
import jinja2.nodes  # noqa: E402
import jinja2.parser  # noqa: E402
import jinja2.sandbox  # noqa: E402


class Refused(jinja2.TemplateError):
    """The template called raise_exception."""


class TooLong(Exception):
    """The rendering exceeds the limit."""


def _raise_exception(message: object = "") -> NoReturn:
    raise Refused(str(message)[:200])


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().astimezone().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (the type that Jinja declares)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, except that reaching for what it hides is an error at once, not an empty string."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise jinja2.exceptions.SecurityError(f"access to {attribute!r}")


def make_environment() -> Environment:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def string_constants(environment: jinja2.Environment, source: str) -> list[str]:
    constants = environment.parse(source).find_all(jinja2.nodes.Const)
    return sorted({node.value for node in constants if isinstance(node.value, str)})


def render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> str:
    chunks = []
    size = 0
    for chunk in template.generate(**variables):
        size += len(chunk)
        if size > max_chars:
            raise TooLong
        chunks.append(chunk)
    return "".join(chunks)


def warm_up(environment: jinja2.Environment) -> None:
    """Makes the interpreter import what it loads on first use, while files can still be opened."""
    source = (
        "{%- for m in m %}{{ ('\\n\\t' + m.a | trim) | tojson }}{{ strftime_now('%d %B %Y') }}{{ m.b.c }}{% endfor %}"
    )
    for broken in (source, "{% broken"):
        try:
            environment.from_string(broken).render(m=[{"a": "é"}])
        except jinja2.TemplateError:
            continue


def limit_process(memory_bytes: int) -> None:
    """Limits for good; memory is what the process may use beyond what it uses now."""
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Descriptors 0 to 2 are open; no further one can be.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def read_exactly(size: int) -> bytes:
    data = sys.stdin.buffer.read(size)
    if len(data) != size:
        # The parent is gone; os._exit, as there is nothing to flush.
        os._exit(0)
    return data


def receive() -> dict[str, Any]:
    (size,) = struct.unpack("<I", read_exactly(4))
    message: dict[str, Any] = json.loads(read_exactly(size))
    return message


def send(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
    sys.stdout.buffer.flush()


def describe(error: BaseException) -> dict[str, str]:
    """The error in words that hold none of the conversation's text."""
    if isinstance(error, Refused):
        return {"check": "template_refused", "message": error.message or ""}
    if isinstance(error, TooLong):
        return {"check": "template_output_too_long", "message": "the rendering is too long"}
    if isinstance(error, (MemoryError, RecursionError, OverflowError)):
        return {"check": "template_too_costly", "message": "the rendering needs too much memory"}
    if isinstance(error, jinja2.exceptions.SecurityError):
        return {"check": "template_unsafe", "message": "the template does what the sandbox forbids"}
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {"check": "template_invalid", "message": f"line {error.lineno}: {str(error.message)[:200]}"}
    return {"check": "template_failed", "message": type(error).__name__}


def main() -> None:
    # A terminal sends its interrupt to every process of the group; only the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup = receive()
    environment = make_environment()
    warm_up(environment)
    limit_process(setup["memory_bytes"])
    # SIGPROF kills by default. It counts processor time, so a busy machine does not make it fire early.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, setup["cpu_seconds"])
    try:
        template = environment.from_string(setup["template"])
        send({"constants": string_constants(environment, setup["template"])})
    except Exception as error:  # noqa: BLE001  (a template can raise anything)
        send({"error": describe(error)})
        return
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        request = receive()
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_seconds"])
        try:
            send({"texts": [render(template, v, setup["max_output_chars"]) for v in request["variables"]]})
        except Exception as error:  # noqa: BLE001  (a template can raise anything)
            send({"error": describe(error)})


if __name__ == "__main__":
    main()
