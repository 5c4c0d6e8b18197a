"""Who a call comes from, and what follows from it: the scopes, whose jobs they are, whose cached prompts they share."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass


class Scope(enum.Enum):
    """What a credential permits."""

    EXECUTE = "execute"
    CANCEL = "cancel"
    HEALTH = "health"
    ADMIN = "admin"


DEFAULT_SCOPES = frozenset({Scope.EXECUTE, Scope.CANCEL, Scope.HEALTH})


@dataclass(frozen=True, slots=True)
class Quota:
    """Most use of the worker in any 60 seconds, and at one time; 0 is no limit.

    Attributes:
        requests_per_minute: generations admitted.
        tokens_per_minute: prompt and generated tokens.
        concurrent_requests: generations that are open at one time.
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_requests: int = 0

    def __bool__(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute or self.concurrent_requests)


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    Attributes:
        name: of the credential, for logs and limits: `key:ID`, `cert:IDENTITY` or `anonymous`. Never secret.
        tenant: owner of its jobs and cached prompts; credentials of one tenant share both. Empty: everyone's.
        scopes: what it may do.
        quota: its own limits; None: the worker's for every credential.
    """

    name: str
    tenant: str
    scopes: frozenset[Scope]
    quota: Quota | None = None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes

    def cache_salt(self, client_salt: bytes = b"") -> bytes:
        """The salt of this caller's prompts in the prefix cache.

        No other tenant can produce it, whatever it sends: how long a prompt takes tells a tenant about its own prompts
        only.

        Args:
            client_salt: what the request asked for, to part a tenant's prompts further.
        """
        if not self.tenant:
            return client_salt
        tenant = self.tenant.encode()
        return hashlib.sha256(b"tokenwire tenant %d %b%b" % (len(tenant), tenant, client_salt)).digest()


ANONYMOUS = Principal("anonymous", "", frozenset(Scope))
"""Everyone, on a worker that was given neither keys nor a client CA and so listens on the loopback address alone."""
