"""How text is cut into words before byte-pair merging, by the name that the model file gives.

Regular expressions never come from a model file: a nested quantifier in one would let a short text run for hours. Each
pattern below is the one its model's authors published in their tokenizer.json; a file may name it or spell it out, and
anything else is unsupported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from tokenwire.text.errors import TokenizerError, UnsupportedTokenizerError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALLOWED_PATTERNS = frozenset({LLAMA3, QWEN2, O200K})


@dataclass(frozen=True, slots=True)
class PreTokenizerRow:
    """What a name stands for.

    Attributes:
        build: makes the pre-tokenizer.
        nfc: whether text is normalised to NFC first.
        ignore_merges: whether a word that is a token as a whole skips the merges.
        add_bos: whether prompts begin with the beginning-of-text token when the file does not say.
    """

    build: Callable[[], PreTokenizer]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_gpt2() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], PreTokenizer]:
    def build() -> PreTokenizer:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    return build


_GPT2 = PreTokenizerRow(_gpt2)
_SMOLLM = PreTokenizerRow(_digits_gpt2)
_LLAMA3 = PreTokenizerRow(_split(LLAMA3), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizerRow(_split(QWEN2), nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizerRow] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": PreTokenizerRow(_split(O200K)),
}


def pre_tokenizer_by_name(name: str) -> PreTokenizerRow:
    """The row of a `tokenizer.ggml.pre` value.

    Raises:
        UnsupportedTokenizerError: the name is not in the table.
    """
    row = PRE_TOKENIZERS.get(name)
    if row is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedTokenizerError("unknown_pre_tokenizer", f"unknown pre-tokenizer {name[:64]!r}; known: {known}")
    return row


def pre_tokenizer_from_json(spec: object) -> PreTokenizer:
    """The pre-tokenizer that a tokenizer.json describes, built from allowed parts only.

    Raises:
        TokenizerError: the description is malformed.
        UnsupportedTokenizerError: it has a part or a pattern that is not allowed.
    """
    parts = [_part_from_json(part) for part in _flatten(spec, "pretokenizers")]
    if not parts or not isinstance(parts[-1], pre_tokenizers.ByteLevel):
        raise UnsupportedTokenizerError(
            "pre_tokenizer_kind", "only pre-tokenizers that end with ByteLevel are supported"
        )
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def normalizer_is_nfc(spec: object) -> bool:
    """Whether a tokenizer.json asks for NFC; no other normalizer is supported.

    Raises:
        UnsupportedTokenizerError: it asks for another one.
    """
    if spec is None:
        return False
    kinds = [part.get("type") for part in _flatten(spec, "normalizers")]
    unsupported = [kind for kind in kinds if kind != "NFC"]
    if unsupported:
        raise UnsupportedTokenizerError("normalizer_kind", f"normalizer {str(unsupported[0])[:64]!r} is not supported")
    return bool(kinds)


def _flatten(spec: object, children: str) -> list[dict[str, object]]:
    if not isinstance(spec, dict):
        raise TokenizerError("section_type", "a pre-tokenizer or normalizer must be an object")
    if spec.get("type") != "Sequence":
        return [spec]
    parts = spec.get(children)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise TokenizerError("section_type", f"a Sequence needs an array of objects named {children}")
    return parts


def _part_from_json(part: dict[str, object]) -> PreTokenizer:
    kind = part.get("type")
    if kind == "ByteLevel":
        return pre_tokenizers.ByteLevel(
            add_prefix_space=part.get("add_prefix_space", True) is True, use_regex=part.get("use_regex", True) is True
        )
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=part.get("individual_digits") is True)
    if kind == "Split":
        pattern = part.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if regex not in ALLOWED_PATTERNS or part.get("behavior") != "Isolated" or part.get("invert") is True:
            raise UnsupportedTokenizerError("regex_not_allowed", "the Split pattern is not one of the known patterns")
        return pre_tokenizers.Split(Regex(str(regex)), behavior="isolated")
    raise UnsupportedTokenizerError("pre_tokenizer_kind", f"pre-tokenizer {str(kind)[:64]!r} is not supported")
