"""Which worker a command talks to, and how: address, TLS, API key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenwire.cli import options
from tokenwire.cli.output import CliError, ExitCode
from tokenwire.client import NO_RETRY, AsyncClient, Client, channel_credentials
from tokenwire.client.auth import ChannelCredentials, key_metadata
from tokenwire.client.request import DEFAULT_TARGET

_PEM = "PEM"

# By parameter of `connect`: what typer makes an option of.
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "target": (options.Target, DEFAULT_TARGET),
    "tls": (
        Annotated[bool, typer.Option("--tls", help="Speak TLS; --ca and --cert imply it.", envvar="TOKENWIRE_TLS")],
        False,
    ),
    "ca": (
        Annotated[
            Path | None,
            typer.Option(help="Roots of the worker's certificate.", envvar="TOKENWIRE_CA_FILE", metavar=_PEM),
        ],
        None,
    ),
    "cert": (
        Annotated[
            Path | None,
            typer.Option(help="Client certificate to show.", envvar="TOKENWIRE_CERT_FILE", metavar=_PEM),
        ],
        None,
    ),
    "key": (
        Annotated[
            Path | None,
            typer.Option(help="Private key of --cert.", envvar="TOKENWIRE_KEY_FILE", metavar=_PEM),
        ],
        None,
    ),
    "api_key": (
        Annotated[
            str | None,
            typer.Option(
                help="API key. Others on this machine can read a command line: prefer the variable, or --api-key-file.",
                envvar="TOKENWIRE_API_KEY",
                metavar="KEY",
                show_default=False,
            ),
        ],
        None,
    ),
    "api_key_file": (
        Annotated[
            Path | None,
            typer.Option(help="File that holds the API key.", envvar="TOKENWIRE_API_KEY_FILE", metavar="FILE"),
        ],
        None,
    ),
}


@dataclass(frozen=True)
class Connection:
    """A worker to talk to. Plain values, which can go to another process."""

    target: str
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    api_key: str | None = field(default=None, repr=False)

    def client(self, timeout_s: float | None = None) -> Client:
        return Client(self.target, credentials=self._credentials(), api_key=self.api_key, timeout_s=timeout_s)

    def async_client(
        self, timeout_s: float | None = None, channel_options: Sequence[tuple[str, int | str]] = ()
    ) -> AsyncClient:
        return AsyncClient(
            self.target,
            credentials=self._credentials(),
            api_key=self.api_key,
            timeout_s=timeout_s,
            options=channel_options,
            retry=NO_RETRY,  # for the benchmark, whose figures must not hide a failure
        )

    def _credentials(self) -> ChannelCredentials | None:
        if not (self.tls or self.ca or self.cert):
            return None
        try:
            return channel_credentials(self.ca, self.cert, self.key)
        except OSError as error:
            raise CliError(f"{error.filename} cannot be read: {error.strerror}", exit_code=ExitCode.USAGE) from error


def connect(
    target: str,
    tls: bool,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    api_key: str | None,
    api_key_file: Path | None,
) -> Connection:
    """
    Raises:
        CliError: the options do not fit together, or the key's file cannot be read; a key is never repeated.
    """
    if (cert is None) != (key is None):
        raise CliError("--cert and --key belong together", exit_code=ExitCode.USAGE)
    if api_key is None and api_key_file is not None:
        api_key = _read_key(api_key_file)
    try:
        key_metadata(api_key)
    except ValueError as error:
        raise CliError(str(error), exit_code=ExitCode.USAGE) from error
    return Connection(target, tls, ca, cert, key, api_key)


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `connect` in place of its first parameter, which gets the Connection."""

    def run(**values: Any) -> None:
        connection = connect(**{name: values.pop(name) for name in _OPTIONS})
        command(connection, **values)

    own = inspect.signature(command, eval_str=True)
    _, *others = own.parameters.values()
    # Arguments come first on the command line and in the help; all are passed by name.
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _OPTIONS.items()
    ]
    parameters = [*(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in others), *shared]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror}", exit_code=ExitCode.USAGE) from error
    except UnicodeDecodeError:
        raise CliError(f"{path} holds no API key", exit_code=ExitCode.USAGE) from None
