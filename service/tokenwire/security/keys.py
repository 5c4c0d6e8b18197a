"""API keys: their text, and the file of their hashes.

A key is `twk_ID_SECRET`. The id finds the record and may be shown; the secret has 256 random bits, and the file holds
the SHA-256 of the whole key. A slow, salted hash defends secrets that people choose, which can be guessed; nobody can
try 2^256 secrets, so one fast hash is as strong, and no caller can make the worker compute a slow one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tokenwire.observe.redaction import API_KEY
from tokenwire.security.principal import DEFAULT_SCOPES, Principal, Quota, Scope

MAX_KEYS = 10_000

_DUMMY_SHA256 = hashlib.sha256(b"no key has this").hexdigest()


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    scopes: tuple[Scope, ...] = Field(min_length=1)
    tenant: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,64}$")
    requests_per_minute: int | None = Field(None, ge=0, le=10**9)
    tokens_per_minute: int | None = Field(None, ge=0, le=10**12)
    concurrent_requests: int | None = Field(None, ge=0, le=10**6)

    def quota(self, default: Quota) -> Quota:
        """The record's limits; what it leaves out is `default`'s."""

        def or_default(own: int | None, other: int) -> int:
            return other if own is None else own

        return Quota(
            or_default(self.requests_per_minute, default.requests_per_minute),
            or_default(self.tokens_per_minute, default.tokens_per_minute),
            or_default(self.concurrent_requests, default.concurrent_requests),
        )


class KeyRecord(_Record):
    """A key as the file holds it. Times are in UTC."""

    id: str = Field(pattern=r"^[a-z2-7]{16}$")
    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created_at: datetime
    expires_at: datetime | None = None

    @field_validator("created_at", "expires_at")
    @classmethod
    def _with_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("needs a time zone, such as Z")
        return value

    def is_expired(self, now_s: float) -> bool:
        """Whether the key is over at `now_s`, seconds since the epoch."""
        return self.expires_at is not None and now_s >= self.expires_at.timestamp()

    def principal(self, default: Quota) -> Principal:
        return Principal(f"key:{self.id}", self.tenant or f"key:{self.id}", frozenset(self.scopes), self.quota(default))


class CertificateRecord(_Record):
    """What a client certificate may do, by its identity: `uri:…`, `dns:…` or `cn:…`."""

    identity: str = Field(pattern=r"^(uri|dns|cn):[!-~]{1,256}$")

    def principal(self, default: Quota) -> Principal:
        name = f"cert:{self.identity}"
        return Principal(name, self.tenant or name, frozenset(self.scopes), self.quota(default))


@dataclass(frozen=True)
class NewKey:
    """A key at the only time its text is known."""

    text: str
    record: KeyRecord

    def __repr__(self) -> str:
        return f"NewKey({self.record.id})"


def create_key(
    name: str,
    scopes: Iterable[Scope] = DEFAULT_SCOPES,
    *,
    tenant: str = "",
    expires_at: datetime | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    concurrent_requests: int | None = None,
) -> NewKey:
    """Draws a key.

    Raises:
        pydantic.ValidationError: a value is outside its bounds.
    """
    key_id = base64.b32encode(secrets.token_bytes(10)).decode().lower()
    text = f"twk_{key_id}_{secrets.token_urlsafe(32)}"
    record = KeyRecord(
        id=key_id,
        name=name,
        sha256=hash_key(text),
        scopes=tuple(sorted(set(scopes), key=lambda scope: scope.value)),
        tenant=tenant,
        created_at=datetime.now(timezone.utc).replace(microsecond=0),
        expires_at=expires_at,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
    )
    return NewKey(text, record)


def hash_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class KeyRing:
    """Every key and certificate that is known.

    Args:
        keys, certificates: with ids and identities that do not repeat.
    """

    def __init__(self, keys: Iterable[KeyRecord] = (), certificates: Iterable[CertificateRecord] = ()) -> None:
        self.keys = {record.id: record for record in keys}
        self.certificates = {record.identity: record for record in certificates}

    def find(self, text: str, now_s: float) -> KeyRecord | None:
        """The record of a key's text, if the key is right and not over.

        A text of any kind costs one hash and one comparison in constant time, so that neither the answer nor its time
        says whether the id, the secret or the date was wrong.

        Args:
            now_s: seconds since the epoch.
        """
        match = API_KEY.fullmatch(text)
        record = self.keys.get(match[1]) if match is not None else None
        # What is not a key's text is as long as it likes; hashing a constant in its place keeps it cheap.
        digest = hash_key(text if match is not None else "")
        right = hmac.compare_digest(digest, record.sha256 if record is not None else _DUMMY_SHA256)
        over = record is not None and record.is_expired(now_s)
        return record if right and not over else None
