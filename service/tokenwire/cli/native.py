"""The compiled engine, for the commands that need it; the others work without it."""

from __future__ import annotations

from types import ModuleType

from tokenwire.cli.output import CliError


def load_native() -> ModuleType:
    """The engine's module.

    Raises:
        CliError: it is missing or cannot be loaded.
    """
    try:
        from tokenwire import _native
    except ImportError as error:
        cause = f"the compiled engine cannot be loaded: {error}"
        raise CliError(cause, "build and install the package again: `make setup`") from error
    return _native
