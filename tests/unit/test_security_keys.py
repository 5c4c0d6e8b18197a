"""API keys and their file: what is accepted, what is said about it, and what is never kept."""

from __future__ import annotations

import hmac
import json
import os
import stat
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwire.observe.redaction import redact
from tokenwire.security import keys as keys_module
from tokenwire.security.key_file import MAX_PROBLEMS, KeyFileError, locked, read_keys, write_keys
from tokenwire.security.keys import CertificateRecord, KeyRing, create_key
from tokenwire.security.principal import ANONYMOUS, Principal, Quota, Scope

NOW_S = 1_800_000_000.0


def test_a_new_key_is_found_by_its_text_alone() -> None:
    new, other = create_key("ci"), create_key("ci")
    ring = KeyRing([new.record, other.record])
    assert ring.find(new.text, NOW_S) is new.record
    assert ring.find(other.text, NOW_S) is other.record
    assert new.text not in repr(new) + repr(new.record) + new.record.model_dump_json()
    assert new.record.sha256 not in repr(new.record)
    assert len({create_key("x").text for _ in range(100)}) == 100


def hostile(text: str) -> list[str]:
    return [
        "",
        text[:-1],
        text + "x",
        text.upper(),
        f" {text}",
        f"{text}\n",
        text[:-1] + ("A" if text[-1] != "A" else "B"),
        text.replace("twk_", "twk-"),
        "twk_" + "a" * 16 + text[20:],
        text[:21] + "A" * 43,
        text + "\x00",
        "\ud800",
        "п" * 64,
        "twk_" * 100_000,
        "x" * 2**20,
    ]


def test_hostile_tokens_are_not_keys() -> None:
    new = create_key("ci")
    ring = KeyRing([new.record])
    assert [text[:40] for text in hostile(new.text) if ring.find(text, NOW_S)] == []


@settings(deadline=None)
@given(st.text())
def test_no_text_is_a_key_by_chance(text: str) -> None:
    assert KeyRing([create_key("ci").record]).find(text, NOW_S) is None


def test_every_refusal_costs_one_constant_time_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """R14: same work for no key, a malformed one, an unknown id, a wrong secret and an expired key."""
    compared: list[tuple[int, int]] = []
    hashed: list[int] = []

    def compare(left: str, right: str) -> bool:
        compared.append((len(left), len(right)))
        return hmac.compare_digest(left, right)

    def hash_key(text: str) -> str:
        hashed.append(len(text))
        return original(text)

    original = keys_module.hash_key
    over = create_key("over", expires_at=datetime.fromtimestamp(NOW_S, timezone.utc))
    new = create_key("ci")
    ring = KeyRing([new.record, over.record])
    monkeypatch.setattr(keys_module, "hmac", SimpleNamespace(compare_digest=compare))
    monkeypatch.setattr(keys_module, "hash_key", hash_key)
    for text in (*hostile(new.text), over.text):
        assert ring.find(text, NOW_S) is None
        assert compared == [(64, 64)]
        assert len(hashed) == 1
        assert hashed[0] in (0, len(new.text))
        compared.clear()
        hashed.clear()


def test_a_key_ends_at_its_time() -> None:
    new = create_key("ci", expires_at=datetime.fromtimestamp(NOW_S, timezone.utc))
    ring = KeyRing([new.record])
    assert ring.find(new.text, NOW_S - 0.001) is new.record
    assert ring.find(new.text, NOW_S) is None


def test_the_file_keeps_keys_and_certificates_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    new = create_key(
        "ci",
        [Scope.ADMIN, Scope.EXECUTE],
        tenant="acme",
        expires_at=datetime(2031, 1, 1, tzinfo=timezone.utc),
        tokens_per_minute=7,
    )
    certificate = CertificateRecord(identity="uri:spiffe://example.org/a", scopes=(Scope.EXECUTE,))
    write_keys(path, KeyRing([new.record], [certificate]))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert new.text.rsplit("_", 1)[1] not in path.read_text()
    ring = read_keys(path)
    assert ring.find(new.text, NOW_S) == new.record
    assert ring.certificates == {certificate.identity: certificate}
    quota = new.record.principal(Quota(1, 2, 3)).quota
    assert quota == Quota(1, 7, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def test_writing_again_keeps_the_mode_and_follows_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    write_keys(real, KeyRing())
    real.chmod(0o640)
    link.symlink_to(real)
    write_keys(link, KeyRing([create_key("ci").record]))
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert len(read_keys(real).keys) == 1


def test_writers_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, KeyRing())

    def add() -> None:
        for _ in range(5):
            with locked(path):
                ring = read_keys(path)
                new = create_key("x").record
                ring.keys[new.id] = new
                write_keys(path, ring)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(path).keys) == 20


def record(**changes: Any) -> dict[str, Any]:
    return {**create_key("ci").record.model_dump(mode="json", exclude_none=True), **changes}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "version 1"),
        ({"version": 2}, "version 1"),
        ({"version": 1, "key": []}, "key: no such field"),
        ({"version": 1, "keys": {}}, "must be a list"),
        ({"version": 1, "keys": [1]}, "keys[0]"),
        ({"version": 1, "keys": [{}]}, "keys[0].sha256: Field required"),
        ({"version": 1, "keys": [record(scopes=[])]}, "keys[0].scopes"),
        ({"version": 1, "keys": [record(scopes=["root"])]}, "keys[0].scopes"),
        ({"version": 1, "keys": [record(id="x")]}, "keys[0].id"),
        ({"version": 1, "keys": [record(tenant="key:other")]}, "keys[0].tenant"),
        ({"version": 1, "keys": [record(expires_at="2030-01-01T00:00:00")]}, "time zone"),
        ({"version": 1, "keys": [record(requests_per_minute=-1)]}, "keys[0].requests_per_minute"),
        ({"version": 1, "keys": [record(other="x")]}, "keys[0].other"),
        ({"version": 1, "keys": [record(id="a" * 16)] * 2}, "more than once"),
        ({"version": 1, "certificates": [{"identity": "x", "scopes": ["admin"]}]}, "certificates[0].identity"),
        ({"version": 1, "keys": [{}] * 10_001}, "more than 10000"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(KeyFileError) as caught:
        read_keys(path)
    assert said in str(caught.value)


def test_all_problems_are_listed_within_bounds_and_without_hashes(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"version": 1, "keys": [record(sha256="SECRET-HASH", name="?")] * 50}))
    with pytest.raises(KeyFileError) as caught:
        read_keys(path)
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert "more problems" in caught.value.problems[-1]
    assert "SECRET-HASH" not in str(caught.value)


def test_a_file_that_everyone_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path, KeyRing())
    path.chmod(0o606)
    with pytest.raises(KeyFileError, match="every user may write"):
        read_keys(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "huge"])
def test_what_is_not_a_file_of_keys_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "keys.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(KeyFileError):
        read_keys(path)


def test_tenants_never_share_a_salt_unless_they_are_one() -> None:
    def principal(tenant: str) -> Principal:
        return Principal("key:a", tenant, frozenset(Scope))

    salts = [principal(tenant).cache_salt(salt) for tenant in ("a", "ab", "key:a") for salt in (b"", b"b", b"bc")]
    assert len(set(salts)) == 9
    assert principal("a").cache_salt(b"x") == principal("a").cache_salt(b"x")
    # A client of an open worker may name any salt, but none that a tenant has.
    assert ANONYMOUS.cache_salt() == b""
    assert ANONYMOUS.cache_salt(b"x") == b"x"


def test_keys_of_one_tenant_share_it_and_others_do_not() -> None:
    records = [create_key("a", tenant="acme").record, create_key("b", tenant="acme").record, create_key("c").record]
    tenants = [record.principal(Quota()).tenant for record in records]
    assert tenants == ["acme", "acme", f"key:{records[2].id}"]


def test_a_key_in_a_text_is_made_unusable() -> None:
    new = create_key("ci")
    text = f"GET /?key={new.text} {new.text}"
    assert redact(text) == f"GET /?key=twk_{new.record.id}_[secret] twk_{new.record.id}_[secret]"


def test_expiry_needs_a_zone_and_scopes_are_kept_once() -> None:
    new = create_key("ci", [Scope.EXECUTE, Scope.EXECUTE, Scope.CANCEL])
    assert new.record.scopes == (Scope.CANCEL, Scope.EXECUTE)
    assert not new.record.is_expired((datetime.now(timezone.utc) + timedelta(days=36500)).timestamp())
