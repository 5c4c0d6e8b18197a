"""The HTTP reference of the documentation site, from an OpenAPI document: every path, answer, schema and field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_BOUNDS = (
    ("minimum", "≥ {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "≤ {}"),
    ("exclusiveMaximum", "< {}"),
    ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"),
    ("minItems", "at least {} items"),
    ("maxItems", "at most {} items"),
    ("minProperties", "at least {} keys"),
    ("maxProperties", "at most {} keys"),
    ("pattern", "matches `{}`"),
)
# Said where they are shown, or not for a reader of a table.
_SHOWN = frozenset({"type", "properties", "required", "items", "anyOf", "enum", "const", "description", "$ref"})
_SILENT = frozenset({"additionalProperties", "propertyNames"})
_KNOWN = _SHOWN | _SILENT | {key for key, _ in _BOUNDS}


def http_reference(document: Schema) -> str:
    lines = [
        "# HTTP reference",
        "",
        "Written from the document that a gateway serves at `/openapi.json` ([this version's](openapi.json)); its",
        "bounds are the validator's. What the paths are for is in [HTTP](../http.md).",
    ]
    tags = dict.fromkeys(tag for _, _, operation in operations(document) for tag in operation["tags"])
    for tag in tags:
        lines += ["", f"## Paths: {tag}"]
        for path, method, operation in operations(document):
            if tag in operation["tags"]:
                lines += operation_lines(path, method, operation)
    lines += ["", "## Schemas"]
    for name, schema in document["components"]["schemas"].items():
        lines += schema_lines(name, schema)
    return "\n".join(lines) + "\n"


def operations(document: Schema) -> Iterator[tuple[str, str, Schema]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method.upper(), operation


def operation_lines(path: str, method: str, operation: Schema) -> Iterator[str]:
    yield from ("", f"### {method} {path}", "", f"{operation['summary']}.")
    if "requestBody" in operation:
        yield from ("", f"Body: {content_type(operation['requestBody'])}.")
    if operation.get("parameters"):
        yield from ("", "| Parameter | In | Type | |", "|---|---|---|---|")
    for parameter in operation.get("parameters", ()):
        name = f"`{parameter['name']}`" + (", required" if parameter.get("required") else "")
        notes = "; ".join(filter(None, (bounds(parameter["schema"]), parameter.get("description"))))
        yield f"| {name} | {parameter['in']} | {type_of(parameter['schema'])} | {cell(notes)} |"
    # Statuses that say the same stand in one row.
    rows: dict[tuple[str, str], list[str]] = {}
    for status, answer in operation["responses"].items():
        rows.setdefault((answer["description"], content_type(answer)), []).append(status)
    yield from ("", "| Status | | Content |", "|---|---|---|")
    for (description, content), statuses in rows.items():
        yield f"| {' '.join(sorted(statuses))} | {description} | {content} |"


def schema_lines(name: str, schema: Schema) -> Iterator[str]:
    yield from ("", f"### {name}", "")
    notes = "; ".join(filter(None, (schema.get("description"), bounds(schema))))
    if notes:
        yield from (f"{notes[0].upper()}{notes[1:]}.", "")
    yield from property_lines(schema)


def property_lines(schema: Schema, prefix: str = "") -> Iterator[str]:
    """A table of an object's fields, those of the objects in it below theirs."""
    if not prefix:
        yield from ("| Field | Type | |", "|---|---|---|")
    for name, field in schema.get("properties", {}).items():
        required = ", required" if name in schema.get("required", ()) else ""
        inner = without_null(field)
        notes = "; ".join(filter(None, (field.get("description") or inner.get("description"), bounds(inner))))
        yield f"| `{prefix}{name}`{required} | {type_of(field)} | {cell(notes)} |"
        if "properties" in inner:
            yield from property_lines(inner, f"{prefix}{name}.")


def type_of(schema: Schema) -> str:
    """What a value may be. Fails on what it does not know, so that nothing is left out of the page in silence."""
    unknown = schema.keys() - _KNOWN
    if unknown:
        raise SystemExit(f"error: the page cannot show {', '.join(sorted(unknown))}")
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(type_of(each) for each in schema["anyOf"])
    if "const" in schema:
        return literal(schema["const"])
    if "enum" in schema:
        return ", ".join(map(literal, schema["enum"]))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {type_of(schema['items'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def bounds(schema: Schema) -> str:
    found = [text.format(schema[key]) for key, text in _BOUNDS if key in schema]
    for each in schema.get("anyOf", ()):
        found += filter(None, [bounds(each)])
    if "items" in schema and (inner := bounds(schema["items"])):
        found.append(f"each {inner}")
    return ", ".join(found)


def without_null(schema: Schema) -> Schema:
    """The schema of a value that is there, where it may also be null."""
    others = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    return others[0] if len(others) == 1 else schema


def content_type(holder: Schema) -> str:
    return " or ".join(f"`{kind}`: {type_of(content['schema'])}" for kind, content in holder["content"].items())


def literal(value: object) -> str:
    named = {None: "null", True: "true", False: "false"}
    return named[value] if value is None or isinstance(value, bool) else f"`{value}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
