"""What a file says about its tokenizer: tokens, merges and special ids, their checks, and the bytes of each token."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn, cast

from tokenizers.pre_tokenizers import PreTokenizer

from tokenwire.text.errors import TokenizerError

TokenizerKind = Literal["gguf-bpe", "gguf-spm", "hf-json"]

MAX_VOCAB_SIZE = 1 << 22
MAX_TOKEN_BYTES = 1 << 14

# Control tokens that end a generation in every model that has them.
END_OF_GENERATION_NAMES = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|end|>",
        "<|return|>",
        "<end_of_turn>",
        "<eos>",
        "</s>",
        "<｜end▁of▁sentence｜>",
    }
)


class TokenType(enum.Enum):
    """What a token is for."""

    NORMAL = "normal"
    """Text, spelled in the byte-level alphabet."""
    CONTROL = "control"
    """A marker: stands for no text, and no text of a user becomes it."""
    USER_DEFINED = "user_defined"
    """Text that is always one token, spelled as it is."""
    UNUSED = "unused"
    """Padding of the vocabulary."""


@dataclass(slots=True)
class Parts:
    """What a file says about its tokenizer, checked only for types; `Tokenizer` checks the rest.

    Attributes:
        tokens: by id.
        types: by id.
        merges: pairs, the most urgent first.
        unsplit_merges: the same written as `left right`, in `merges`' place.
        eos_ids: tokens that the file names as ends of a generation.
        lstrip, rstrip: control tokens that swallow the white space before and after them.
    """

    kind: TokenizerKind
    tokens: list[str]
    types: list[TokenType]
    merges: list[tuple[str, str]]
    pre_tokenizer: PreTokenizer
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    lstrip: frozenset[int] = frozenset()
    rstrip: frozenset[int] = frozenset()
    warnings: list[str] = field(default_factory=list)
    unsplit_merges: Sequence[str] = ()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: printable Latin-1 is itself, the rest follows from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES_AS_LATIN1 = str.maketrans(
    # Latin-1 characters outside the alphabet must not pass as bytes; U+0100 makes the encoding fail.
    dict.fromkeys(map(chr, range(0x80, 0x100)), "\u0100") | {char: chr(byte) for char, byte in _byte_alphabet().items()}
)


def vocabulary_bytes(parts: Parts) -> list[bytes]:
    """The bytes of each token. Tokens in the byte-level alphabet are translated all at once: a character is a byte."""
    normal = TokenType.NORMAL
    texts = [text if kind is normal else "" for text, kind in zip(parts.tokens, parts.types, strict=True)]
    try:
        data = "".join(texts).translate(_BYTES_AS_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return list(map(_token_bytes, parts.tokens, parts.types))
    ends = list(itertools.accumulate(map(len, texts)))
    found = [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    for token_id, kind in enumerate(parts.types):
        if kind is not normal:
            found[token_id] = _token_bytes(parts.tokens[token_id], kind)
    return found


def _token_bytes(text: str, kind: TokenType) -> bytes:
    if kind in (TokenType.CONTROL, TokenType.UNUSED):
        return b""
    if kind is TokenType.NORMAL:
        try:
            return text.translate(_BYTES_AS_LATIN1).encode("latin-1")
        except UnicodeEncodeError:
            # Some files list added tokens as normal ones; those are spelled as they are.
            return text.encode("utf-8")
    return text.encode("utf-8")


def check_vocabulary(parts: Parts) -> None:
    """All but the merges.

    Raises:
        TokenizerError: sizes, tokens or special ids that cannot be.
    """
    size = len(parts.tokens)
    if size == 0:
        raise TokenizerError("vocabulary_empty", "the vocabulary is empty")
    if size > MAX_VOCAB_SIZE:
        raise TokenizerError("vocabulary_too_large", f"the vocabulary has {size} tokens, the limit is {MAX_VOCAB_SIZE}")
    if len(parts.types) != size:
        raise TokenizerError("token_types_length", f"{size} tokens but {len(parts.types)} token types")
    unused = TokenType.UNUSED
    used = [text for text, kind in zip(parts.tokens, parts.types, strict=True) if kind is not unused]
    if not all(used) or max(map(len, used), default=0) > MAX_TOKEN_BYTES or len(set(used)) < len(used):
        _name_bad_token(parts)
    if TokenType.NORMAL not in parts.types:
        raise TokenizerError("vocabulary_empty", "the vocabulary has no text tokens")
    for special_id in (parts.bos_id, parts.eos_id, *parts.eos_ids):
        if special_id is not None and not 0 <= special_id < size:
            raise TokenizerError("special_id_out_of_range", f"special token {special_id} is outside {size} tokens")


def _name_bad_token(parts: Parts) -> NoReturn:
    first: dict[str, int] = {}
    for token_id, (text, kind) in enumerate(zip(parts.tokens, parts.types, strict=True)):
        if kind is TokenType.UNUSED:
            continue
        if not text:
            raise TokenizerError("token_empty", f"token {token_id} is empty")
        if len(text) > MAX_TOKEN_BYTES:
            raise TokenizerError("token_too_long", f"token {token_id} has {len(text)} characters")
        if text in first:
            raise TokenizerError("token_duplicate", f"tokens {first[text]} and {token_id} are equal")
        first[text] = token_id
    raise AssertionError("no token is bad")


def check_merges(parts: Parts) -> None:
    """Of each pair, both tokens and the one that they make.

    Raises:
        TokenizerError: a merge names a token that is not there.
    """
    normal = TokenType.NORMAL
    known = {text for text, kind in zip(parts.tokens, parts.types, strict=True) if kind is normal}
    if known.issuperset(itertools.chain.from_iterable(parts.merges)) and known.issuperset(map("".join, parts.merges)):
        return
    for rank, (left, right) in enumerate(parts.merges):
        if left not in known or right not in known or left + right not in known:
            raise TokenizerError("merge_unknown_token", f"merge {rank} names a token that is not in the vocabulary")


def token_type_by_name(text: str, declared: TokenType) -> TokenType:
    """Treats `<|…|>` and known end-of-generation names as control tokens where a file declares them user-defined."""
    if declared is TokenType.USER_DEFINED and (
        text in END_OF_GENERATION_NAMES or (text.startswith("<|") and text.endswith("|>"))
    ):
        return TokenType.CONTROL
    return declared


def split_merges(entries: Sequence[str]) -> list[tuple[str, str]]:
    """Merges written as `left right`.

    Raises:
        TokenizerError: an entry is not two words.
    """
    merges = [tuple(entry.split(" ")) for entry in entries]
    if not (set(map(len, merges)) <= {2} and all(map(all, merges))):
        rank = next(rank for rank, merge in enumerate(merges) if len(merge) != 2 or not all(merge))
        raise TokenizerError("merge_malformed", f"merge {rank} is not two tokens with a space between")
    return cast("list[tuple[str, str]]", merges)
