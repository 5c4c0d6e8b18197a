"""A byte-level BPE tokenizer over the `tokenizers` library, whatever file it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Backend

from tokenwire.text.errors import InvalidTextError, TokenizerError
from tokenwire.text.vocabulary import (
    END_OF_GENERATION_NAMES,
    Parts,
    TokenizerKind,
    TokenType,
    check_merges,
    check_vocabulary,
    split_merges,
    vocabulary_bytes,
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
        check_vocabulary(parts)
        if parts.add_bos and parts.bos_id is None:
            raise TokenizerError("bos_missing", "prompts begin with the BOS token, but the file names none")
        self.kind: TokenizerKind = parts.kind
        self.vocab_size = len(parts.tokens)
        self.bos_id = parts.bos_id
        self.eos_id = parts.eos_id
        self.add_bos = parts.add_bos
        self.warnings = tuple(parts.warnings)
        self._tokens = parts.tokens
        control = TokenType.CONTROL
        self._control_ids = {parts.tokens[i]: i for i, kind in enumerate(parts.types) if kind is control}
        named = {token_id for name, token_id in self._control_ids.items() if name in END_OF_GENERATION_NAMES}
        eos = {parts.eos_id} if parts.eos_id is not None else set()
        self.stop_token_ids = sorted(named | parts.eos_ids | eos)
        self._vocabulary = vocabulary_bytes(parts)
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
            check_merges(self._parts)
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


def _build_backend(parts: Parts) -> Backend:
    # Control tokens are left out of the backend, so that no merge, cache or whole-word match can ever produce one.
    normal, user_defined = TokenType.NORMAL, TokenType.USER_DEFINED
    vocab = {
        parts.tokens[token_id]: token_id
        for token_id, kind in enumerate(parts.types)
        if kind is normal or kind is user_defined
    }
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=parts.merges, ignore_merges=parts.ignore_merges))
        backend.pre_tokenizer = parts.pre_tokenizer
        if parts.nfc:
            backend.normalizer = normalizers.NFC()
        backend.add_tokens(
            [
                AddedToken(parts.tokens[token_id], normalized=False, special=False)
                for token_id, kind in enumerate(parts.types)
                if kind is user_defined
            ]
        )
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError("rejected", f"the tokenizer library refused the vocabulary: {error}") from error
    return backend
