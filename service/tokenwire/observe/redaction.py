"""What no log line may hold, and its removal."""

from __future__ import annotations

import re

# An API key: its id, which may be shown, and its secret.
API_KEY = re.compile(r"twk_([a-z2-7]{16})_([A-Za-z0-9_-]{43})", re.ASCII)


def redact(text: str) -> str:
    """The text with the secret of every API key in it replaced."""
    return API_KEY.sub(r"twk_\1_[secret]", text) if "twk_" in text else text
