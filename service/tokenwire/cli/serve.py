"""`tokenwire serve`: the worker."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Mapping
from pathlib import Path

import typer

from tokenwire.cli import options
from tokenwire.cli.native import load_native
from tokenwire.cli.output import ExitCode, print_error
from tokenwire.cli.settings import load_or_exit, with_setting_flags
from tokenwire.config import Settings
from tokenwire.config_sources import ConfigError, load_settings


def serve(config: Path | None, flags: Mapping[str, object]) -> None:
    """Serve a model over gRPC until SIGTERM or Ctrl-C; a second one cuts the drain short.

    Every flag can be set as TOKENWIRE_NAME in the environment or as name in the --config file too; a flag wins over the
    environment, the environment over the file. Defaults stand in brackets.
    """
    gc.disable()  # until the worker is ready: what a start makes stays
    with contextlib.suppress(ConfigError):  # which are all reported below
        _open_device_early(load_settings(flags, config))
    # Here, not above: the device's driver needs as long as all these imports.
    from tokenwire.security.setup import file_problems

    settings = load_or_exit(config, flags, file_problems)
    if not settings.model:
        print_error("there is no model to serve", "name one: `tokenwire serve --model smollm2`")
        raise typer.Exit(ExitCode.CONFIG)
    from tokenwire.server import run

    raise typer.Exit(run(settings))


app = options.command_app(with_setting_flags(serve))


def _open_device_early(settings: Settings) -> None:
    """Takes the GPU that will serve while the service is imported and the tokenizer read; its driver needs as long."""
    native = load_native()
    if settings.model and settings.device != "cpu":
        wanted = settings.cuda_device
        number = -1 if wanted is None else int(wanted.removeprefix("cuda:"))
        threading.Thread(target=native.open_cuda_device, args=(number,), daemon=True).start()
