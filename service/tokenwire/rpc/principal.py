"""Who is calling. Whatever authenticates a call sets it; whatever belongs to one caller asks for it."""

from __future__ import annotations

from contextvars import ContextVar

PRINCIPAL: ContextVar[str] = ContextVar("tokenwire_principal", default="")
"""A stable name of the authenticated caller, in the context of its call; empty where calls are not authenticated."""
