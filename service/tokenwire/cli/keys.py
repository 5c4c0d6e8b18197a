"""`tokenwire keys`: make, list and revoke API keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from tokenwire.cli import options
from tokenwire.cli.output import CliError, ExitCode, note, print_facts
from tokenwire.security.key_file import KeyFileError, locked, read_keys, write_keys
from tokenwire.security.keys import KeyRecord, KeyRing, create_key
from tokenwire.security.principal import DEFAULT_SCOPES, Scope

app = typer.Typer(
    help="Make, list and revoke API keys. A running worker takes a change on SIGHUP.",
    no_args_is_help=True,
    add_completion=False,
    **options.PLAIN,
)

File = Annotated[
    Path,
    typer.Option(
        "--file", help="File of keys, as the worker's api_keys_file.", envvar="TOKENWIRE_API_KEYS_FILE", metavar="FILE"
    ),
]

_DURATION = re.compile(r"(\d{1,6})([hdw])")
_UNIT = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for: A-Z, a-z, 0-9, '.', '_', '-'.", show_default=False)],
    file: File,
    scope: Annotated[
        list[Scope] | None, typer.Option(help="What it permits; may be repeated. Default: execute, cancel, health.")
    ] = None,
    tenant: Annotated[
        str, typer.Option(help="Keys of one tenant share jobs and cached prompts. Default: the key alone.")
    ] = "",
    expires: Annotated[
        str | None, typer.Option(help="After this long, such as 12h, 90d or 52w. Default: never.", metavar="TIME")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Limit in place of the worker's; 0 is no limit.", min=0, metavar="N")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Limit in place of the worker's; 0 is no limit.", min=0, metavar="N")
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(help="Limit in place of the worker's; 0 is no limit.", min=0, metavar="N")
    ] = None,
) -> None:
    """Make a key. Its text goes to stdout and is shown this once; the file holds only its hash."""
    try:
        new = create_key(
            name,
            scope or DEFAULT_SCOPES,
            tenant=tenant,
            expires_at=_expiry(expires) if expires is not None else None,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_requests=concurrent_requests,
        )
    except ValidationError as error:
        wrong = ", ".join(str(item["loc"][0]) for item in error.errors(include_input=False))
        raise CliError(f"{wrong}: not allowed", "`tokenwire keys create --help`", ExitCode.USAGE) from error
    with _changing(file, may_create=True) as ring:
        ring.keys[new.record.id] = new.record
    print(new.text)
    note(f"{name} ({new.record.id}) permits {_scopes(new.record)}; it is not shown again")


@app.command("list")
def list_keys(file: File, as_json: options.Json = False) -> None:
    """Show the keys. Their texts are not known any more."""
    ring = _read(file)
    records = sorted(ring.keys.values(), key=lambda record: record.created_at)
    if as_json:
        shown = [record.model_dump(mode="json", exclude={"sha256"}) for record in records]
        print(json.dumps(shown, ensure_ascii=False))
        return
    if records:
        print_facts([("ID", "NAME", "TENANT", "SCOPES", "CREATED", "EXPIRES"), *map(_row, records)])
    else:
        note("there are no keys; `tokenwire keys create NAME` makes one")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID|NAME", help="Id of a key, or a name that only one has.")],
    file: File,
) -> None:
    """Take a key back for good."""
    with _changing(file) as ring:
        found = [record for record in ring.keys.values() if key in (record.id, record.name)]
        if not found:
            raise CliError(f"no key has the id or name {key}", "`tokenwire keys list` shows them")
        if len(found) > 1:
            ids = ", ".join(record.id for record in found)
            raise CliError(f"{len(found)} keys have the name {key}", f"name one by its id: {ids}")
        del ring.keys[found[0].id]
    note(f"{found[0].name} ({found[0].id}) is revoked; a running worker refuses it after SIGHUP")


@contextmanager
def _changing(file: Path, may_create: bool = False) -> Iterator[KeyRing]:
    """The keys, written back if the block ends well."""
    try:
        with locked(file):
            ring = KeyRing() if may_create and not file.exists() else _read(file)
            yield ring
            write_keys(file, ring)
    except OSError as error:
        raise CliError(f"{file} cannot be written: {error.strerror}") from error


def _read(file: Path) -> KeyRing:
    try:
        return read_keys(file)
    except KeyFileError as error:
        raise CliError(str(error), "", ExitCode.CONFIG) from error


def _expiry(text: str) -> datetime:
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise CliError(f"--expires: {text!r} is not a time such as 12h, 90d or 52w", "", ExitCode.USAGE)
    try:
        return datetime.now(timezone.utc).replace(microsecond=0) + int(match[1]) * _UNIT[match[2]]
    except OverflowError as error:
        raise CliError("--expires: is beyond the calendar", "", ExitCode.USAGE) from error


def _scopes(record: KeyRecord) -> str:
    return ", ".join(scope.value for scope in record.scopes)


def _row(record: KeyRecord) -> tuple[str, ...]:
    expires = "never" if record.expires_at is None else _day(record.expires_at)
    return (record.id, record.name, record.tenant or "-", _scopes(record), _day(record.created_at), expires)


def _day(time: datetime) -> str:
    return time.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M")
