"""Where settings come from, and what is wrong with them.

A setting's value comes from the first of: a flag (`--max-queued-jobs`), the environment (`TOKENWIRE_MAX_QUEUED_JOBS`),
the TOML file named by `--config`, its default. `load_settings` reports every problem at once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tokenwire.config import Settings
from tokenwire.http_config import GatewaySettings

ENV_PREFIX = "TOKENWIRE_"

# What Kubernetes puts into TOKENWIRE_PORT for a Service called `tokenwire`, and into TOKENWIRE_METRICS_PORT for one
# called `tokenwire-metrics`: an address, not a setting of ours.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")


S = TypeVar("S", bound=BaseModel)


class ConfigError(Exception):
    """The configuration is not usable. `problems` has one line for each thing that is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def load_settings(
    flags: Mapping[str, object] | None = None,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    check_files: Callable[[Mapping[str, object]], list[str]] | None = None,
) -> Settings:
    """Merges the sources and checks the result.

    Args:
        flags: values given on the command line, by setting name; None means not given.
        config_file: a TOML file with settings at its top level.
        environ: the environment; default: the process's.
        check_files: given the merged values by setting name, says what is wrong with the files that they name.

    Raises:
        ConfigError: with every problem found.
    """
    return _load(Settings, flags, config_file, environ, check_files)


def load_gateway_settings(
    flags: Mapping[str, object] | None = None,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    check_files: Callable[[Mapping[str, object]], list[str]] | None = None,
) -> GatewaySettings:
    """As `load_settings`, for a gateway apart."""
    return _load(GatewaySettings, flags, config_file, environ, check_files)


def _load(
    kind: type[S],
    flags: Mapping[str, object] | None,
    config_file: Path | None,
    environ: Mapping[str, str] | None,
    check_files: Callable[[Mapping[str, object]], list[str]] | None = None,
) -> S:
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    values: dict[str, object] = {}
    origin: dict[str, str] = {}

    def add(name: str, value: object, source: str) -> None:
        values[name] = value
        origin[name] = source

    if config_file is not None:
        for name, value in _read_toml(config_file, problems).items():
            add(name, value, str(config_file))
    for name in kind.model_fields:
        variable = ENV_PREFIX + name.upper()
        text = environ.get(variable)
        if text is not None and not (name.endswith("port") and _SERVICE_LINK.match(text)):
            add(name, text, variable)
    for name, value in (flags or {}).items():
        if value is not None:
            add(name, value, "--" + name.replace("_", "-"))

    settings = _validate(kind, values, origin, problems)
    if check_files is not None:
        problems += check_files(values)
    if settings is None or problems:
        raise ConfigError(problems)
    return settings


def _validate(kind: type[S], values: Mapping[str, object], origin: Mapping[str, str], problems: list[str]) -> S | None:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        refused: set[int | str] = set()
        for item in error.errors(include_url=False, include_context=False):
            problems.extend(_problems(item["loc"], item["type"], item["msg"], origin))
            refused.update(item["loc"][:1])
        if refused:  # rules between settings are checked only once each is right by itself: ask again without these
            _validate(kind, {name: value for name, value in values.items() if name not in refused}, origin, problems)
        return None


def _problems(location: tuple[int | str, ...], kind: str, message: str, origin: Mapping[str, str]) -> list[str]:
    message = message.removeprefix("Value error, ")
    if not location:
        return message.split("\n")
    name = str(location[0])
    if kind == "extra_forbidden":
        message = "no such setting"
    return [f"{name} (from {origin.get(name, 'default')}): {message}"]


def _read_toml(path: Path, problems: list[str]) -> dict[str, object]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]
    try:
        values: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))
        return values
    except OSError as error:
        problems.append(f"config ({path}): cannot be read: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"config ({path}): not valid TOML: {error}")
    return {}
