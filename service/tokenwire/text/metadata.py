"""Typed access to a model file's metadata: every getter checks the type before anyone uses the value."""

from __future__ import annotations

from typing import Protocol

from tokenwire.text.errors import TokenizerError


class Metadata(Protocol):
    """The part of `tokenwire._native.GgufFile` that the tokenizer reads."""

    def keys(self) -> list[str]: ...
    def get(self, key: str) -> object:
        """The value of `key`, or None if there is none."""

    def get_bytes(self, key: str) -> list[bytes] | None:
        """An array of strings as bytes, or None if there is none."""


def get_str(metadata: Metadata, key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise TokenizerError("metadata_type", f"{key} must be a string")
    return value


def get_bool(metadata: Metadata, key: str) -> bool | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError("metadata_type", f"{key} must be a boolean")
    return value


def get_token_id(metadata: Metadata, key: str, vocab_size: int) -> int | None:
    """A token id inside the vocabulary, or None if the file names none."""
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TokenizerError("metadata_type", f"{key} must be an integer")
    if not 0 <= value < vocab_size:
        raise TokenizerError("special_id_out_of_range", f"{key} is {value}, but the vocabulary has {vocab_size} tokens")
    return value


def get_ints(metadata: Metadata, key: str) -> list[int] | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise TokenizerError("metadata_type", f"{key} must be an array of integers")
    return value


def get_strings(metadata: Metadata, key: str) -> list[str] | None:
    """An array of strings, each valid UTF-8."""
    try:
        raw = metadata.get_bytes(key)
    except Exception as error:
        raise TokenizerError("metadata_type", f"{key} must be an array of strings") from error
    if raw is None:
        return None
    strings: list[str] = []
    try:
        strings.extend(map(bytes.decode, raw))
    except UnicodeDecodeError as error:
        raise TokenizerError("token_utf8", f"entry {len(strings)} of {key} is not valid UTF-8") from error
    return strings
