"""`tokenwire gateway`: HTTP in front of workers that run elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from tokenwire.cli import options
from tokenwire.cli.settings import load_gateway_or_exit, with_setting_flags
from tokenwire.http_config import GatewaySettings


def gateway(config: Path | None, flags: Mapping[str, object]) -> None:
    """Serve HTTP, server-sent events and the OpenAI API in front of workers, until SIGTERM or Ctrl-C.

    Every flag can be set as TOKENWIRE_NAME in the environment or as name in the --config file too; a flag wins over the
    environment, the environment over the file. Defaults stand in brackets.
    """
    # Here, not above: the other commands start faster without the gateway.
    from tokenwire.security.setup import file_problems

    settings = load_gateway_or_exit(config, flags, file_problems)
    from tokenwire.gateway.server import run_gateway
    from tokenwire.process import run_loop

    raise typer.Exit(run_loop(run_gateway(settings)))


app = options.command_app(with_setting_flags(gateway, GatewaySettings))
