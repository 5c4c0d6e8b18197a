"""A byte-level BPE tokenizer over the `tokenizers` library, whatever file it came from."""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import PreTokenizer

from tokenwire.text.errors import InvalidTextError, TokenizerError

TokenizerKind = Literal["gguf-bpe", "gguf-spm", "hf-json"]

MAX_VOCAB_SIZE = 1 << 22
MAX_TOKEN_BYTES = 1 << 14

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
"""Control tokens that end a generation in every model that has them."""


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


class Tokenizer:
    """Text to token ids and back. Immutable, and safe to use from several threads.

    Attributes:
        kind: where it came from.
        vocab_size: number of ids.
        bos_id, eos_id: or None.
        add_bos: whether a prompt begins with `bos_id`.
        stop_token_ids: every end-of-generation token, ascending.
        warnings: oddities of the file that did not prevent its use.

    Args:
        parts: what the file says.
        deferred: leave the part that encodes, which takes longest, to `build`; until then only `encode` is missing.

    Raises:
        TokenizerError: the parts contradict each other.
    """

    def __init__(self, parts: Parts, *, deferred: bool = False) -> None:
        _check_vocabulary(parts)
        if parts.add_bos and parts.bos_id is None:
            raise TokenizerError("bos_missing", "prompts begin with the BOS token, but the file names none")
        self.kind: TokenizerKind = parts.kind
        self.vocab_size = len(parts.tokens)
        self.bos_id = parts.bos_id
        self.eos_id = parts.eos_id
        self.add_bos = parts.add_bos
        self.warnings = tuple(parts.warnings)
        self._tokens = parts.tokens
        self._control_ids = {t: i for i, t in enumerate(parts.tokens) if parts.types[i] is TokenType.CONTROL}
        named = {token_id for name, token_id in self._control_ids.items() if name in END_OF_GENERATION_NAMES}
        eos = {parts.eos_id} if parts.eos_id is not None else set()
        self.stop_token_ids = sorted(named | parts.eos_ids | eos)
        self._vocabulary = _vocabulary_bytes(parts)
        self._parts = parts
        self._built: Backend | None = None
        if not deferred:
            self.build()
        self._control_pattern = _control_pattern(self._control_ids)
        self._lstrip = parts.lstrip
        self._rstrip = parts.rstrip

    def build(self) -> None:
        """Makes a deferred tokenizer whole; does nothing for another.

        Raises:
            TokenizerError: the merges are malformed, or the library refuses the vocabulary.
        """
        if self._built is None:
            if self._parts.unsplit_merges:
                self._parts.merges = split_merges(self._parts.unsplit_merges)
            _check_merges(self._parts)
            self._built = _build_backend(self._parts)

    @property
    def _backend(self) -> Backend:
        if self._built is None:
            raise RuntimeError("a deferred tokenizer is used before build()")
        return self._built

    @property
    def control_tokens(self) -> frozenset[str]:
        """The spellings of all control tokens."""
        return frozenset(self._control_ids)

    def token_text(self, token_id: int | None) -> str:
        """A token's spelling in the file; empty for None."""
        return "" if token_id is None else self._tokens[token_id]

    def vocabulary(self) -> list[bytes]:
        """The bytes that each id stands for in text; empty for control tokens and padding."""
        return list(self._vocabulary)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing in it becomes a control token, and no BOS is added.

        Characters of which the vocabulary lacks a byte are dropped, as the models' own tokenizers do.

        Raises:
            InvalidTextError: a lone surrogate.
        """
        check_unicode(text)
        # The library's path that keeps no offsets: less memory, and up to twice as fast on long texts.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def split_control(self, text: str) -> list[str | int]:
        """Cuts text at the control tokens that it spells: ids stand for those, strings for what lies between."""
        if self._control_pattern is None:
            return [text] if text else []
        pieces: list[str | int] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            pieces += [text[end : match.start()], self._control_ids[match[0]]]
            end = match.end()
        pieces.append(text[end:])
        return [piece for piece in pieces if piece != ""]

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Ids of what `split_control` returned; strings are plain text, whatever they spell.

        Raises:
            InvalidTextError: a lone surrogate.
        """
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            if index > 0 and pieces[index - 1] in self._rstrip:
                piece = piece.lstrip()
            if index + 1 < len(pieces) and pieces[index + 1] in self._lstrip:
                piece = piece.rstrip()
            ids.extend(self.encode(piece))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of all ids at once; bytes that are not UTF-8 become U+FFFD. The engine's stream equals this."""
        return b"".join(self._vocabulary[token_id] for token_id in ids).decode("utf-8", "replace")


def check_unicode(text: str) -> None:
    """Refuses lone surrogates, which no encoding can carry.

    Raises:
        InvalidTextError: there is one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Not chained: the codec's exception carries the text.
        message = f"the text has a lone surrogate at character {error.start}"
        raise InvalidTextError("invalid_unicode", message) from None


def _control_pattern(control_ids: dict[str, int]) -> re.Pattern[str] | None:
    if not control_ids:
        return None
    # The longest spelling first: of two tokens where one begins the other, the longer one is meant.
    return re.compile("|".join(re.escape(text) for text in sorted(control_ids, key=len, reverse=True)))


def _vocabulary_bytes(parts: Parts) -> list[bytes]:
    """The bytes of each token. Tokens in the byte-level alphabet are translated all at once: a character is a byte."""
    normal = [t for t, kind in zip(parts.tokens, parts.types, strict=True) if kind is TokenType.NORMAL]
    try:
        data = "".join(normal).translate(_BYTES_AS_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return [_token_bytes(t, kind) for t, kind in zip(parts.tokens, parts.types, strict=True)]
    ends = itertools.accumulate(map(len, normal))
    slices = (data[end - len(text) : end] for text, end in zip(normal, ends, strict=True))
    return [
        next(slices) if kind is TokenType.NORMAL else _token_bytes(text, kind)
        for text, kind in zip(parts.tokens, parts.types, strict=True)
    ]


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


def _check_vocabulary(parts: Parts) -> None:
    size = len(parts.tokens)
    if size == 0:
        raise TokenizerError("vocabulary_empty", "the vocabulary is empty")
    if size > MAX_VOCAB_SIZE:
        raise TokenizerError("vocabulary_too_large", f"the vocabulary has {size} tokens, the limit is {MAX_VOCAB_SIZE}")
    if len(parts.types) != size:
        raise TokenizerError("token_types_length", f"{size} tokens but {len(parts.types)} token types")
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
    if not any(kind is TokenType.NORMAL for kind in parts.types):
        raise TokenizerError("vocabulary_empty", "the vocabulary has no text tokens")
    for special_id in (parts.bos_id, parts.eos_id, *parts.eos_ids):
        if special_id is not None and not 0 <= special_id < size:
            raise TokenizerError("special_id_out_of_range", f"special token {special_id} is outside {size} tokens")


def _check_merges(parts: Parts) -> None:
    known = {text for text, kind in zip(parts.tokens, parts.types, strict=True) if kind is TokenType.NORMAL}
    for rank, (left, right) in enumerate(parts.merges):
        if left not in known or right not in known or left + right not in known:
            raise TokenizerError("merge_unknown_token", f"merge {rank} names a token that is not in the vocabulary")


def _build_backend(parts: Parts) -> Backend:
    # Control tokens are left out of the backend, so that no merge, cache or whole-word match can ever produce one.
    vocab = {t: i for i, t in enumerate(parts.tokens) if parts.types[i] in (TokenType.NORMAL, TokenType.USER_DEFINED)}
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=parts.merges, ignore_merges=parts.ignore_merges))
        backend.pre_tokenizer = parts.pre_tokenizer
        if parts.nfc:
            backend.normalizer = normalizers.NFC()
        backend.add_tokens(
            [
                AddedToken(text, normalized=False, special=False)
                for text, kind in zip(parts.tokens, parts.types, strict=True)
                if kind is TokenType.USER_DEFINED
            ]
        )
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError("rejected", f"the tokenizer library refused the vocabulary: {error}") from error
    return backend


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
    merges = []
    for rank, entry in enumerate(entries):
        left, space, right = entry.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError("merge_malformed", f"merge {rank} is not two tokens with a space between")
        merges.append((left, right))
    return merges
