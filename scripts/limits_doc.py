"""Renews the tables of docs/limits.md from the bounds in the code: `python scripts/limits_doc.py`."""

from __future__ import annotations

import re
from pathlib import Path

from tokenwire.bounds import markdown_tables
from tokenwire.config_sources import load_settings

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "limits.md"


def renew(text: str) -> str:
    """The document with each table in its place, between the markers of its name."""
    for name, table in markdown_tables(load_settings(environ={})).items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text, count = pattern.subn(lambda _, b=begin, t=table, e=end: f"{b}\n\n{t}\n{e}", text)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{DOCUMENT} has {count} places for the table {name!r}")
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(renew(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
