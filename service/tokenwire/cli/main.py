"""The command line: what commands there are, and how their failures end the process."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from tokenwire import __version__
from tokenwire.cli.options import PLAIN
from tokenwire.cli.output import CliError, ExitCode, configure_streams, print_error

EPILOG = (
    "Exit codes: 0 done; 1 failed, the reason is on stderr; 2 wrong usage; 78 bad configuration, every problem is "
    "listed; 130 interrupted."
)

# Each is a file beside this one, which has it as `app`.
_COMMANDS = ("serve", "gateway", "generate", "chat", "pull", "bench", "health", "info", "keys")


class _Commands(typer.core.TyperGroup):
    """Imports a command when it is asked for: a worker's start does not wait for what the others need."""

    def list_commands(self, ctx: Any) -> list[str]:
        for name in _COMMANDS:
            self.get_command(ctx, name)
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            self.list_commands(ctx)  # for the suggestion of one that is spelt nearly so
        elif cmd_name not in self.commands:
            module = importlib.import_module(f"tokenwire.cli.{cmd_name}")
            command = typer.main.get_command(module.app)
            command.name = cmd_name
            self.commands[cmd_name] = command
        return self.commands.get(cmd_name)


app = typer.Typer(
    cls=_Commands,
    help="Streaming LLM inference over gRPC, with an engine of its own.",
    epilog=EPILOG,
    no_args_is_help=True,
    **PLAIN,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tokenwire.cli.info import build_line

        print(f"tokenwire {__version__} ({build_line()})")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show version and build.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


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
