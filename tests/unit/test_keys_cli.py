"""`tokenwire keys`, and the options with which every client command shows a key and a certificate."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from scripted_worker import Worker
from tokenwire.cli.connection import connect
from tokenwire.security.key_file import read_keys, write_keys
from tokenwire.security.keys import API_KEY, KeyRing, create_key
from unit.commands import Run

NOW_S = 1_800_000_000.0


def test_a_key_is_made_listed_and_revoked(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    made = run(
        "keys", "create", "ci", "--file", str(file), "--scope", "execute", "--tenant", "acme", "--expires", "90d"
    )
    assert made.code == 0
    text = made.out.strip()
    match = API_KEY.fullmatch(text)
    assert match is not None
    record = read_keys(file).find(text, NOW_S)
    assert record is not None
    assert (record.name, record.tenant, [scope.value for scope in record.scopes]) == ("ci", "acme", ["execute"])
    assert match[2] not in made.err + file.read_text()

    shown = run("keys", "list", "--file", str(file))
    assert record.id in shown.out
    as_json = json.loads(run("keys", "list", "--json", "--file", str(file)).out)
    assert as_json[0]["id"] == record.id
    for output in (shown.out, json.dumps(as_json)):
        assert match[2] not in output
        assert record.sha256 not in output

    gone = run("keys", "revoke", "ci", "--file", str(file))
    assert (gone.code, read_keys(file).keys) == (0, {})
    assert "SIGHUP" in gone.err


def test_the_file_may_come_from_the_environment(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENWIRE_API_KEYS_FILE", str(tmp_path / "keys.json"))
    assert run("keys", "create", "a").code == 0
    assert len(json.loads(run("keys", "list", "--json").out)) == 1


def test_two_keys_of_a_name_are_revoked_by_id_only(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first, second = create_key("ci").record, create_key("ci").record
    write_keys(file, KeyRing([first, second]))
    unclear = run("keys", "revoke", "ci", "--file", str(file))
    assert unclear.code == 1
    assert first.id in unclear.err
    assert run("keys", "revoke", first.id, "--file", str(file)).code == 0
    assert list(read_keys(file).keys) == [second.id]
    assert run("keys", "revoke", "nobody", "--file", str(file)).code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["create", "a b"], 2, "name: not allowed"),
        (["create", "a", "--tenant", "key:x"], 2, "tenant: not allowed"),
        (["create", "a", "--expires", "0d"], 2, "--expires"),
        (["create", "a", "--expires", "90"], 2, "--expires"),
        (["create", "a", "--expires", "999999w"], 2, "--expires"),
        (["create", "a", "--scope", "root"], 2, "scope"),
        (["create", "a", "--requests-per-minute", "-1"], 2, "requests-per-minute"),
        (["list"], 78, "No such file"),
        (["revoke", "x"], 78, "No such file"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    run: Run, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    file = tmp_path / "keys.json"
    result = run("keys", *arguments, "--file", str(file))
    assert result.code == code
    assert said in result.err
    assert not file.exists()


def test_a_broken_file_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text("{")
    assert run("keys", "create", "a", "--file", str(file)).code == 78
    assert file.read_text() == "{"
    assert run("keys", "create", "a", "--file", str(tmp_path / "absent" / "keys.json")).code == 1


KEY = create_key("k").text


@pytest.mark.parametrize("way", ["flag", "variable", "file"])
def test_every_way_to_name_a_key_reaches_the_worker(
    run: Run, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    arguments = ["generate", "Hi", "--target", worker.target]
    if way == "flag":
        arguments += ["--api-key", KEY]
    elif way == "variable":
        monkeypatch.setenv("TOKENWIRE_API_KEY", KEY)
    else:
        (tmp_path / "key").write_text(f"{KEY}\n")
        arguments += ["--api-key-file", str(tmp_path / "key")]
    result = run(*arguments)
    assert result.code == 0
    assert worker.metadata["authorization"] == f"Bearer {KEY}"
    assert KEY not in result.out + result.err


def test_without_a_key_none_is_sent(run: Run, worker: Worker) -> None:
    assert run("generate", "Hi", "--target", worker.target).code == 0
    assert "authorization" not in worker.metadata


@pytest.mark.parametrize("key", ["a b", "a\n", "schlüssel", " a", ""])
def test_a_text_that_is_no_key_is_refused_and_not_repeated(run: Run, key: str) -> None:
    result = run("generate", "Hi", "--api-key", f"SECRET{key}\x00" if key == "" else f"SECRET{key}")
    assert result.code == 2
    assert "SECRET" not in result.out + result.err


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "health"])
def test_help_names_the_variable_and_never_its_value(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("TOKENWIRE_API_KEY", KEY)
    result = run(command, "--help")
    assert "TOKENWIRE_API_KEY" in result.out
    for option in ("--tls", "--ca", "--cert", "--key", "--api-key", "--api-key-file"):
        assert option in result.out
    assert KEY not in result.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cert", "x"], "--cert and --key belong together"),
        (["--key", "x"], "--cert and --key belong together"),
        (["--ca", "/absent/ca.pem"], "/absent/ca.pem cannot be read"),
        (["--api-key-file", "/absent/key"], "/absent/key cannot be read"),
    ],
)
def test_connection_options_that_do_not_work_say_why(run: Run, arguments: list[str], said: str) -> None:
    result = run("health", *arguments)
    assert result.code == 2
    assert said in result.err


def test_a_connection_travels_to_other_processes_and_never_shows_its_key() -> None:
    connection = connect("127.0.0.1:1", False, None, None, None, KEY, None)
    assert KEY not in repr(connection)
    assert pickle.loads(pickle.dumps(connection)) == connection  # noqa: S301


def test_the_command_keeps_the_lines_of_grpc_out_of_stderr() -> None:
    script = "import os, tokenwire.cli.main; print(os.environ['GRPC_VERBOSITY'])"
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environ, check=True, timeout=60)
    assert done.stdout == b"ERROR\n"


def test_serve_lists_problems_of_settings_and_files_together(run: Run, tmp_path: Path) -> None:
    """A-1: one start, one list, exit 78."""
    keys = tmp_path / "keys.json"
    keys.write_text("{")
    result = run(
        "serve", "--model", "x", "--host", "0.0.0.0", "--api-keys-file", str(keys),
        "--tls-cert-file", str(tmp_path / "absent"), "--port", "70000",
    )  # fmt: skip
    assert result.code == 78
    assert "4 problems" in result.err
    for said in ("port", "needs allow_remote", "not valid JSON", "tls_cert_file: needs tls_key_file"):
        assert said in result.err
