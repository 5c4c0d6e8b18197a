"""Command-line flags from config.py's settings, so that a setting is declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tokenwire.cli.output import ExitCode, print_error
from tokenwire.config import Settings
from tokenwire.config_sources import ENV_PREFIX, ConfigError, load_gateway_settings, load_settings
from tokenwire.http_config import GatewaySettings, HttpSettings

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file with settings.", envvar="TOKENWIRE_CONFIG", metavar="FILE")
]


def with_setting_flags(
    command: Callable[[Path | None, Mapping[str, object]], None], kind: type[BaseModel] = Settings
) -> Callable[..., None]:
    """The command with `--config` and a flag for every setting; it gets the file and the flags by setting name.

    Values stay text until config.py reads them, so that it reports every problem of every source at once.
    """

    def run(config: Path | None, **flags: object) -> None:
        command(config, flags)

    parameters = [inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile)]
    # What the command is about comes first in its help, the gateway's settings last.
    for name, field in sorted(kind.model_fields.items(), key=lambda item: item[0] in HttpSettings.model_fields):
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(name, field))
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def load_or_exit(
    config: Path | None,
    flags: Mapping[str, object],
    check_files: Callable[[Mapping[str, object]], list[str]] | None = None,
) -> Settings:
    """The settings in force; a bad configuration ends the command with exit code 78 and every problem listed."""
    try:
        return load_settings(flags, config, check_files=check_files)
    except ConfigError as error:
        _refuse(error, "serve")


def load_gateway_or_exit(
    config: Path | None,
    flags: Mapping[str, object],
    check_files: Callable[[Mapping[str, object]], list[str]] | None = None,
) -> GatewaySettings:
    """As `load_or_exit`, for a gateway apart."""
    try:
        return load_gateway_settings(flags, config, check_files=check_files)
    except ConfigError as error:
        _refuse(error, "gateway")


def _refuse(error: ConfigError, command: str) -> NoReturn:
    count = len(error.problems)
    print_error(
        f"the configuration has {count} problem{'s' if count > 1 else ''}",
        f"`tokenwire {command} --help` describes every setting",
        error.problems,
    )
    raise typer.Exit(ExitCode.CONFIG) from None


def setting_origins(config: Path | None, settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Where each setting's value comes from: `TOKENWIRE_…`, the file's name, or `default`."""
    in_file = load_settings(None, config, {}).model_fields_set if config is not None else set()
    origins = {}
    for name in Settings.model_fields:
        variable = ENV_PREFIX + name.upper()
        if name not in settings.model_fields_set:
            origins[name] = "default"
        elif variable in environ:
            origins[name] = variable
        else:
            origins[name] = str(config) if name in in_file else "flag"
    return origins


def _flag(name: str, field: FieldInfo) -> Any:
    flag = "--" + name.replace("_", "-")
    text = (field.description or "").rstrip(".")
    if field.default not in (None, ""):
        text += f" [{field.default}]"
    if field.annotation is bool:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)]
    kind = {int: "N", float: "X"}.get(field.annotation, "") if isinstance(field.annotation, type) else ""
    return Annotated[str | None, typer.Option(flag, help=text, show_default=False, metavar=kind or "TEXT")]
