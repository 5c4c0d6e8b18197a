"""The command line: what commands there are, and how their failures end the process."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tokenwire import __version__
from tokenwire.cli.bench import bench
from tokenwire.cli.chat import chat
from tokenwire.cli.connection import with_connection
from tokenwire.cli.gateway import gateway
from tokenwire.cli.generate import generate
from tokenwire.cli.health import health
from tokenwire.cli.info import build_line, info
from tokenwire.cli.keys import app as keys_app
from tokenwire.cli.output import CliError, ExitCode, configure_streams, print_error
from tokenwire.cli.pull import pull
from tokenwire.cli.serve import serve
from tokenwire.cli.settings import with_setting_flags
from tokenwire.http_config import GatewaySettings

EPILOG = (
    "Exit codes: 0 done; 1 failed, the reason is on stderr; 2 wrong usage; 78 bad configuration, every problem is "
    "listed; 130 interrupted."
)

# Plain help: it wraps at any width and never cuts a flag's name short.
app = typer.Typer(
    help="Streaming LLM inference over gRPC, with an engine of its own.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tokenwire {__version__} ({build_line()})")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show version and build.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command()(with_setting_flags(serve))
app.command()(with_setting_flags(gateway, GatewaySettings))
app.command()(with_connection(generate))
app.command()(with_connection(chat))
app.command()(pull)
app.command()(with_connection(bench))
app.command()(with_connection(health))
app.command()(info)
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Runs the command; a failure is one line with its cause and its remedy, never a traceback."""
    configure_streams()
    try:
        app(prog_name="tokenwire")
    except CliError as error:
        print_error(error.cause, error.remedy)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
