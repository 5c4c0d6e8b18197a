"""A call that was let in, and how the code that serves it finds it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tokenwire.errors import TokenwireError
from tokenwire.security.limits import OpenRequest
from tokenwire.security.principal import ANONYMOUS, Principal

if TYPE_CHECKING:
    from typing_extensions import Self


class Admission:
    """A call that was let in; a context manager that ends with it."""

    def __init__(
        self, principal: Principal, request: OpenRequest | None, on_close: Callable[[Admission], None]
    ) -> None:
        self.principal = principal
        self.revoked = False
        self._request = request
        self._kept = False
        self._on_close = on_close
        self._revocations: list[Callable[[], None]] = []

    def reserve_tokens(self, num_tokens: int) -> None:
        """See `OpenRequest.reserve_tokens`."""
        if self._request is not None:
            self._request.reserve_tokens(num_tokens)

    def settle_tokens(self, num_tokens: int) -> None:
        if self._request is not None:
            self._request.settle_tokens(num_tokens)

    def on_revoked(self, end: Callable[[], None]) -> None:
        """Calls `end` once the credential is taken back, at once if it already was."""
        self._revocations.append(end)
        if self.revoked:
            end()

    def require_valid(self) -> None:
        """For calls that go on: checks again.

        Raises:
            TokenwireError: UNAUTHENTICATED once the credential was taken back.
        """
        if self.revoked:
            raise revoked_error()

    def revoke(self) -> None:
        self.revoked = True
        for end in self._revocations:
            end()

    @contextlib.contextmanager
    def keep_open(self) -> Iterator[None]:
        """For work that outlives the call: until this ends it counts as open, and ends with its credential."""
        self._kept = True
        try:
            yield
        finally:
            self._kept = False
            self.close()

    def close(self) -> None:
        """The call is over. Idempotent."""
        if self._kept:
            return
        if self._request is not None:
            self._request.close()
        self._on_close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def revoked_error() -> TokenwireError:
    return TokenwireError("UNAUTHENTICATED", "the credential was revoked")


_current: ContextVar[Admission | None] = ContextVar("admission", default=None)
_OPEN = Admission(ANONYMOUS, None, lambda _: None)


def current_admission() -> Admission:
    """Of the call that this task serves; everyone's where no guard stands before it."""
    return _current.get() or _OPEN


def set_current_admission(admission: Admission) -> None:
    """For the guard of a port: says whose call this task serves."""
    _current.set(admission)
