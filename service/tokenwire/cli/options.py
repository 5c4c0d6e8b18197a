"""What more than one command takes, and how each is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

# Plain help: it wraps at any width and never cuts a flag's name short.
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


def command_app(command: Callable[..., None]) -> typer.Typer:
    """One command, for `cli/main.py` to find as its file's `app`."""
    app = typer.Typer(add_completion=False, **PLAIN)
    app.command()(command)
    return app


# Sampling: what is left out keeps the worker's default.

Target = Annotated[str, typer.Option(help="Address of the worker.", envvar="TOKENWIRE_TARGET", metavar="HOST:PORT")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Timeout = Annotated[float | None, typer.Option(help="Give up after this many seconds.", metavar="SECONDS", min=0)]

MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate.", min=0, max=2**32 - 1)]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy, 1 as trained, higher more random.")]
TopP = Annotated[float | None, typer.Option(help="Keep the most probable tokens up to this sum.")]
TopK = Annotated[
    int | None,
    typer.Option(help="Keep this many most probable tokens; 0 is off.", min=0, max=2**32 - 1),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop tokens below this share of the most probable one."),
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 discourages tokens already generated.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End before this text appears; may be given up to 4 times."),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Repeat a sampled answer exactly.", min=0, max=2**64 - 1),
]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Above 0 discourages a token the more, the more it came.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Above 0 discourages tokens that came at all.")]
Logprobs = Annotated[
    int | None,
    typer.Option(help="With --json: report this many alternatives to each token.", min=0, max=2**32 - 1),
]
Priority = Annotated[
    int | None,
    typer.Option(help="Class to wait in, -2 to 2; higher ones go first.", min=-(2**31), max=2**31 - 1),
]
CacheSalt = Annotated[
    str | None,
    typer.Option(help="Share cached prompts only with requests of the same salt.", metavar="TEXT"),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(help="The answer must be JSON that the schema in this file accepts.", metavar="FILE"),
]
Regex = Annotated[
    str | None,
    typer.Option(help="The whole answer must match this regular expression.", metavar="PATTERN"),
]
