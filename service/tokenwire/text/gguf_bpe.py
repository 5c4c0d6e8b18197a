"""The byte-level BPE tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

from tokenwire.text.errors import TokenizerError
from tokenwire.text.metadata import Metadata, get_bool, get_ints, get_str, get_strings, get_token_id
from tokenwire.text.pre_tokenizers import pre_tokenizer_by_name
from tokenwire.text.tokenizer import Tokenizer
from tokenwire.text.vocabulary import Parts, TokenType, token_type_by_name

_USER_DEFINED = 4
_TYPES = {
    1: TokenType.NORMAL,
    2: TokenType.CONTROL,  # unknown
    3: TokenType.CONTROL,
    _USER_DEFINED: TokenType.USER_DEFINED,
    5: TokenType.UNUSED,
    6: TokenType.NORMAL,  # a byte, which byte-level vocabularies spell like text
}


def load_gguf_bpe(metadata: Metadata, *, deferred: bool = False) -> Tokenizer:
    """The tokenizer of `tokenizer.ggml.tokens`, `merges`, `token_type` and `pre`; `deferred` as `Tokenizer` has it.

    Raises:
        TokenizerError: an entry is missing or contradicts another.
        UnsupportedTokenizerError: the pre-tokenizer is unknown.
    """
    warnings: list[str] = []
    pre = get_str(metadata, "tokenizer.ggml.pre")
    if pre is None:
        warnings.append("the file names no pre-tokenizer; GPT-2's is used")
        pre = "default"
    row = pre_tokenizer_by_name(pre)

    tokens = get_strings(metadata, "tokenizer.ggml.tokens")
    if tokens is None:
        raise TokenizerError("vocabulary_missing", "the file has no tokenizer.ggml.tokens")
    merges = get_strings(metadata, "tokenizer.ggml.merges")
    if merges is None:
        raise TokenizerError("merges_missing", "the file has no tokenizer.ggml.merges")
    add_bos = get_bool(metadata, "tokenizer.ggml.add_bos_token")
    size = len(tokens)
    return Tokenizer(
        Parts(
            kind="gguf-bpe",
            tokens=tokens,
            types=_token_types(metadata, tokens),
            merges=[],
            unsplit_merges=merges,
            pre_tokenizer=row.build(),
            nfc=row.nfc,
            ignore_merges=row.ignore_merges,
            add_bos=row.add_bos if add_bos is None else add_bos,
            bos_id=get_token_id(metadata, "tokenizer.ggml.bos_token_id", size),
            eos_id=get_token_id(metadata, "tokenizer.ggml.eos_token_id", size),
            eos_ids=end_ids(metadata, size),
            warnings=warnings,
        ),
        deferred=deferred,
    )


def end_ids(metadata: Metadata, vocab_size: int) -> frozenset[int]:
    """Tokens that the file names as the end of a turn or of a message."""
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    found = (get_token_id(metadata, key, vocab_size) for key in keys)
    return frozenset(token_id for token_id in found if token_id is not None)


def _token_types(metadata: Metadata, tokens: list[str]) -> list[TokenType]:
    declared = get_ints(metadata, "tokenizer.ggml.token_type")
    if declared is None:
        return [TokenType.NORMAL] * len(tokens)
    if len(declared) != len(tokens):
        raise TokenizerError("token_types_length", f"{len(tokens)} tokens but {len(declared)} token types")
    if unknown := set(declared) - _TYPES.keys():
        token_id, number = next((i, number) for i, number in enumerate(declared) if number in unknown)
        raise TokenizerError("token_type_unknown", f"token {token_id} has the unknown type {number}")
    types = [_TYPES[number] for number in declared]
    for token_id, number in enumerate(declared):
        if number == _USER_DEFINED:
            types[token_id] = token_type_by_name(tokens[token_id], TokenType.USER_DEFINED)
    return types
