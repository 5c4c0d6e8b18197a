"""The one decision for every call of either port: who is it, may it, and is there room."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenwire.errors import TokenwireError
from tokenwire.security.admission import Admission
from tokenwire.security.key_file import read_keys
from tokenwire.security.keys import KeyRing
from tokenwire.security.limits import Clock, Limiter
from tokenwire.security.policy import Rule
from tokenwire.security.principal import ANONYMOUS, DEFAULT_SCOPES, Principal, Quota

# Metadata with `Guard.vouch`, from the HTTP port of this process to its gRPC port.
VOUCHED_KEY = "x-tokenwire-vouched"

# Longer identities are refused: they end up in logs and in memory.
MAX_IDENTITY_CHARS = 256


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a call brought to say who it is, as it came.

    Attributes:
        authorization: values of every `authorization` header or metadata entry.
        api_keys: values of every `x-api-key`.
        certificate: identity of a client certificate that the handshake verified; None without one.
    """

    authorization: Sequence[str] = ()
    api_keys: Sequence[str] = ()
    certificate: str | None = None


class Guard:
    """Decides on calls. All methods belong to the event loop's thread.

    Args:
        keys_file: whose keys are needed; None: no keys.
        client_certificates: whether the ports verify client certificates, which then identify callers without a key.
        each: limits of a credential that has none of its own.
        overall: limits of all together.
        clock, wall_clock: seconds, for rates and for expiry.

    Raises:
        KeyFileError: the file is not usable.
    """

    def __init__(
        self,
        keys_file: Path | None = None,
        *,
        client_certificates: bool = False,
        each: Quota | None = None,
        overall: Quota | None = None,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
    ) -> None:
        self._keys_file = keys_file
        self._client_certificates = client_certificates
        self._each = each or Quota()
        self._limiter = Limiter(overall or Quota(), clock)
        self._wall_clock = wall_clock
        self._ring = read_keys(keys_file) if keys_file is not None else KeyRing()
        self._principals: dict[str, Principal] = {}  # of keys that called, by id
        self._admissions: dict[str, set[Admission]] = {}
        # Known to the ports of this process alone: with it, one tells another whose certificate it has verified.
        self._port_secret = secrets.token_urlsafe(32)
        self._anonymous = Principal(ANONYMOUS.name, ANONYMOUS.tenant, ANONYMOUS.scopes, self._each)

    @property
    def is_open(self) -> bool:
        """Whether everyone may call everything: there are neither keys nor client certificates."""
        return self._keys_file is None and not self._client_certificates

    @property
    def num_keys(self) -> int:
        return len(self._ring.keys)

    @property
    def num_open(self) -> int:
        """Calls that are let in and not over."""
        return sum(len(admissions) for admissions in self._admissions.values())

    @property
    def limiter(self) -> Limiter:
        return self._limiter

    def vouch(self, identity: str) -> str:
        """For another port of this process: that it verified a client certificate of this identity."""
        return f"{self._port_secret} {identity}"

    def vouched(self, value: str) -> str | None:
        """The identity that `vouch` was given; None if nobody here did."""
        secret, _, identity = value.partition(" ")
        right = hmac.compare_digest(secret.encode("utf-8", "replace"), self._port_secret.encode())
        return identity if right and identity else None

    def needs_certificate(self, credentials: Credentials) -> bool:
        """Whether a certificate can change the decision: a key, where keys are known, says who calls by itself."""
        has_key = self._keys_file is not None and (credentials.authorization or credentials.api_keys)
        return self._client_certificates and not has_key

    def authenticate(self, credentials: Credentials) -> Principal:
        """Who calls.

        Raises:
            TokenwireError: UNAUTHENTICATED, in the same words whatever is wrong with the one credential sent.
        """
        if self.is_open:
            return self._anonymous
        sent = len(credentials.authorization) + len(credentials.api_keys)
        if sent > 1:
            cause = "AMBIGUOUS_CREDENTIALS"
            raise TokenwireError("UNAUTHENTICATED", "more than one credential was sent", cause=cause)
        if sent and self._keys_file is not None:
            text = _bearer(credentials.authorization[0]) if credentials.authorization else credentials.api_keys[0]
            record = self._ring.find(text, self._wall_clock())
            if record is None:
                raise TokenwireError("UNAUTHENTICATED")
            principal = self._principals.get(record.id)
            if principal is None:
                principal = self._principals[record.id] = record.principal(self._each)
            return principal
        if credentials.certificate is not None:
            principal = _of_certificate(credentials.certificate, self._ring, self._each)
            if principal is None:
                raise TokenwireError("UNAUTHENTICATED")
            return principal
        self._ring.find("", 0.0)  # no key takes as long as a wrong one
        raise TokenwireError("UNAUTHENTICATED")

    def authorize(self, rule: Rule | None, credentials: Credentials) -> Principal:
        """Who calls, if it may make a call of this rule.

        Raises:
            TokenwireError: UNAUTHENTICATED, or PERMISSION_DENIED.
        """
        if rule is not None and rule.public:
            return self._anonymous
        principal = self.authenticate(credentials)
        if rule is None or (rule.scope is not None and not principal.may(rule.scope)):
            raise TokenwireError("PERMISSION_DENIED")
        return principal

    def check_limits(self, rule: Rule | None, principal: Principal) -> None:
        """Refuses early what `admit` would refuse; counts nothing.

        Raises:
            TokenwireError: OVERLOADED.
        """
        if rule is not None and rule.limited:
            self._limiter.check(principal)

    def admit(self, rule: Rule | None, principal: Principal) -> Admission:
        """Lets an authorized call in; it must be closed.

        Raises:
            TokenwireError: OVERLOADED.
        """
        request = self._limiter.open(principal) if rule is not None and rule.limited else None
        admission = Admission(principal, request, self._forget)
        self._admissions.setdefault(principal.name, set()).add(admission)
        return admission

    def reload(self) -> int:
        """Reads the keys anew, and ends what credentials that are gone, or lost a scope, have open.

        Returns:
            how many calls were ended.

        Raises:
            KeyFileError: the old keys stay in force.
        """
        if self._keys_file is None:
            return 0
        old, self._ring = self._ring, read_keys(self._keys_file)
        self._principals.clear()
        ended = 0
        for name, admissions in list(self._admissions.items()):
            if self._still_holds(name, old):
                continue
            for admission in list(admissions):
                admission.revoke()
                ended += 1
        return ended

    def _still_holds(self, name: str, old: KeyRing) -> bool:
        kind, _, identity = name.partition(":")
        if kind == "key":
            before, after = old.keys.get(identity), self._ring.keys.get(identity)
            # One that was missing before was ended then.
            return before is None or (
                after is not None
                and after.sha256 == before.sha256
                and after.tenant == before.tenant
                and set(after.scopes) >= set(before.scopes)
                and not after.is_expired(self._wall_clock())
            )
        if kind == "cert":
            was, now = _of_certificate(identity, old, self._each), _of_certificate(identity, self._ring, self._each)
            return was is None or (now is not None and now.tenant == was.tenant and now.scopes >= was.scopes)
        return True

    def _forget(self, admission: Admission) -> None:
        name = admission.principal.name
        admissions = self._admissions.get(name)
        if admissions is not None:
            admissions.discard(admission)
            if not admissions:
                del self._admissions[name]


def certificate_identity(uris: Iterable[str], dns_names: Iterable[str], common_names: Iterable[str]) -> str | None:
    """The name of a verified client certificate: its first URI, else DNS name, else common name."""
    for kind, names in (("uri", uris), ("dns", dns_names), ("cn", common_names)):
        name = next(iter(names), "")
        if name:
            usable = len(name) <= MAX_IDENTITY_CHARS and name.isascii() and name.isprintable() and " " not in name
            return f"{kind}:{name}" if usable else None
    return None


def _of_certificate(identity: str, ring: KeyRing, each: Quota) -> Principal | None:
    """Whom a verified certificate stands for. A file that lists any certificates admits no others."""
    record = ring.certificates.get(identity)
    if record is not None:
        return record.principal(each)
    if ring.certificates:
        return None
    name = f"cert:{identity}"
    return Principal(name, name, DEFAULT_SCOPES, each)


def _bearer(value: str) -> str:
    """The token of `Bearer TOKEN`; empty if it is anything else. The scheme's case does not matter (RFC 9110)."""
    scheme, _, token = value.partition(" ")
    return token if scheme.lower() == "bearer" else ""
