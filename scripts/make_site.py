"""Gathers the documentation site's sources: the repository's pages as they are, and the references from their sources.

    python scripts/make_site.py [DIRECTORY]     # default build/site-src, where mkdocs.yml looks

A link to another page leads there; one to a file that is no page becomes the file's name; one to nothing fails the
build. `make docs` runs this and then `mkdocs build --strict`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from openapi_page import http_reference

from tokenwire.config import Settings
from tokenwire.gateway import openapi

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ROOT / "protos"

# Pages that live elsewhere in the repository, and their names on the site.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "benchmarks/README.md": "benchmarks-peers.md",
    "benchmarks/NOTES.md": "benchmarks-notes.md",
    "deploy/README.md": "deployment.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


class BrokenLinkError(Exception):
    """A page links to what is not there."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "build" / "site-src")
    directory: Path = parser.parse_args().directory
    shutil.rmtree(directory, ignore_errors=True)
    pages = {path: path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))}
    pages |= {ROOT / source: name for source, name in ELSEWHERE.items()}
    try:
        for source, name in pages.items():
            write(directory / name, with_links(source, name, pages))
    except BrokenLinkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(directory / "reference" / "grpc.md", grpc_reference())
    document = openapi.document()
    write(directory / "reference" / "http.md", http_reference(document))
    write(directory / "reference" / "openapi.json", json.dumps(document, indent=1) + "\n")
    write(directory / "reference" / "settings.md", settings_reference())
    write(directory / "reference" / "cli.md", cli_reference())
    print(f"{len(pages) + 4} pages in {directory}")
    return 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def with_links(source: Path, name: str, pages: dict[Path, str]) -> str:
    """A page's text with links that hold on the site.

    Raises:
        BrokenLinkError: a link leads nowhere.
    """

    def replaced(match: re.Match[str]) -> str:
        text, target = match.groups()
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return match[0]
        place, _, anchor = target.partition("#")
        path = (source.parent / place).resolve()
        if path in pages:
            here = os.path.relpath(pages[path], Path(name).parent)
            return f"[{text}]({here}{'#' + anchor if anchor else ''})"
        if not path.exists() or not path.is_relative_to(ROOT):
            raise BrokenLinkError(f"{source.relative_to(ROOT)} links to {target}, which is not there")
        shown = path.relative_to(ROOT).as_posix()
        return text if shown in text else f"{text} (`{shown}`)"

    # Code is not for links: the parts between fences are every second one.
    parts = _FENCE.split(source.read_text(encoding="utf-8"))
    return "".join(part if place % 2 else _LINK.sub(replaced, part) for place, part in enumerate(parts))


def grpc_reference() -> str:
    """Every service, message and field of the protos with its comment."""
    files = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "all.pb"
        include = Path(protoc.__file__).parent / "_proto"
        arguments = ["protoc", f"-I{PROTOS}", f"-I{include}", f"--descriptor_set_out={output}", "--include_source_info"]
        if protoc.main([*arguments, *files]) != 0:
            raise SystemExit("error: the protos do not compile")
        described = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())
    lines = [
        "# gRPC reference",
        "",
        "Written from the comments of `protos/`; every field has its unit and bounds there.",
    ]
    for file in described.file:
        comments = {tuple(place.path): place.leading_comments.strip() for place in file.source_code_info.location}
        lines += ["", f"## `{file.package}`: {file.name}"]
        for number, service in enumerate(file.service):
            lines += ["", f"### Service {service.name}", "", comments.get((6, number), "")]
            lines += ["", "| Method | Request | Answer | |", "|---|---|---|---|"]
            for place, method in enumerate(service.method):
                answer = ("stream of " if method.server_streaming else "") + short(method.output_type)
                comment = cell(comments.get((6, number, 2, place), ""))
                lines.append(f"| `{method.name}` | {short(method.input_type)} | {answer} | {comment} |")
        for number, enum in enumerate(file.enum_type):
            lines += enum_lines(enum, (5, number), comments, 3)
        for number, message in enumerate(file.message_type):
            lines += message_lines(message, (4, number), comments)
    return "\n".join(lines) + "\n"


Comments = dict[tuple[int, ...], str]


def message_lines(
    message: descriptor_pb2.DescriptorProto, path: tuple[int, ...], comments: Comments, prefix: str = ""
) -> Iterator[str]:
    if message.options.map_entry:
        return
    yield from ("", f"### {prefix}{message.name}", "", comments.get(path, ""))
    if message.field:
        yield from ("", "| Field | Type | |", "|---|---|---|")
    for number, field in enumerate(message.field):
        name = f"`{field.name}` = {field.number}"
        yield f"| {name} | {type_name(field, message)} | {cell(comments.get((*path, 2, number), ''))} |"
    for number, enum in enumerate(message.enum_type):
        yield from enum_lines(enum, (*path, 4, number), comments, 4)
    for number, nested in enumerate(message.nested_type):
        yield from message_lines(nested, (*path, 3, number), comments, f"{prefix}{message.name}.")


def enum_lines(
    enum: descriptor_pb2.EnumDescriptorProto, path: tuple[int, ...], comments: Comments, level: int
) -> Iterator[str]:
    yield from ("", f"{'#' * level} {enum.name}", "", comments.get(path, ""), "", "| Value | |", "|---|---|")
    for number, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {cell(comments.get((*path, 2, number), ''))} |"


def type_name(field: descriptor_pb2.FieldDescriptorProto, message: descriptor_pb2.DescriptorProto) -> str:
    kind = field.Type.Name(field.type).removeprefix("TYPE_").lower()
    shown = short(field.type_name) if field.type_name else f"`{kind}`"
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{nested.name}"):
            key, value = (type_name(entry, nested).strip("`") for entry in nested.field)
            return f"`map<{key}, {value}>`"
    if field.label == field.LABEL_REPEATED:
        return f"repeated {shown}"
    if field.HasField("oneof_index") and not field.proto3_optional:
        return f"{shown}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return f"optional {shown}" if field.proto3_optional else shown


def short(name: str) -> str:
    return f"`{name.rsplit('.', 1)[-1]}`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def settings_reference() -> str:
    """Every setting of `tokenwire serve`."""
    lines = [
        "# Settings",
        "",
        "Written from `config.py`. A setting is a flag (`--max-queued-jobs`), a variable (`TOKENWIRE_MAX_QUEUED_JOBS`)",
        "and a key of the TOML file that `--config` names; the first of these that is given wins.",
        "",
        "| Setting | Default | Bounds | Meaning |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        bounds = [
            f"{sign} {getattr(rule, attribute)}"
            for rule in field.metadata
            for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
            if hasattr(rule, attribute)
        ]
        default = "none" if field.default in (None, "") else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {', '.join(bounds)} | {cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def cli_reference() -> str:
    """The help of each command, as it is printed."""
    lines = ["# Commands", "", "What `--help` says."]
    overview = help_text(())
    lines += ["", "```", overview, "```"]
    for command in re.findall(r"^  ([a-z]+)  +\S", overview.split("Commands:")[1], re.MULTILINE):
        lines += ["", f"## tokenwire {command}", "", "```", help_text((command,)), "```"]
    return "\n".join(lines) + "\n"


def help_text(command: Sequence[str]) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TOKENWIRE_")}
    environment |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(
        [sys.executable, "-m", "tokenwire", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=environment,
    )
    return "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())


if __name__ == "__main__":
    sys.exit(main())
