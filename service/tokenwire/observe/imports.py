"""Imports that a start need not wait for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import cast


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """What is imported meanwhile does not find `package`, unless it is imported already. For optional ones alone."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = cast(ModuleType, None)  # for an import the mark of what is not there
    try:
        yield
    finally:
        del sys.modules[package]
