"""The site's HTTP reference holds all that the gateway's OpenAPI document does."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from tokenwire.gateway.openapi import document

PAGE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "openapi_page.py"))


def section(page: str, heading: str) -> str:
    return page.split(f"\n### {heading}\n")[1].split("\n###")[0].split("\n## ")[0]


def test_the_page_has_every_path_answer_schema_and_field() -> None:
    described = document()
    page = PAGE["http_reference"](described)
    for path, item in described["paths"].items():
        for method, operation in item.items():
            text = section(page, f"{method.upper()} {path}")
            listed = {status for line in text.splitlines() if line.startswith("| ") for status in line.split()[1:]}
            assert set(operation["responses"]) <= listed, path
            for parameter in operation.get("parameters", ()):
                assert f"| `{parameter['name']}`" in text, path
    for name, schema in described["components"]["schemas"].items():
        text = section(page, name)
        for field in schema.get("properties", {}):
            assert f"| `{field}`" in text, f"{name}.{field}"


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer or null"),
        (
            {"type": "array", "items": {"$ref": "#/components/schemas/ChatMessage"}},
            "list of [ChatMessage](#chatmessage)",
        ),
        ({"enum": ["a", 1, None, False]}, "`a`, `1`, null, false"),
        ({"type": ["object", "string"]}, "object or string"),
    ],
)
def test_types_are_said_in_words(schema: dict[str, Any], shown: str) -> None:
    assert PAGE["type_of"](schema) == shown


def test_what_the_page_cannot_show_fails_the_build() -> None:
    with pytest.raises(SystemExit, match="oneOf"):
        PAGE["type_of"]({"oneOf": []})
