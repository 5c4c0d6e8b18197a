"""The byte-level BPE tokenizer of a Hugging Face tokenizer.json.

The file is never handed to the tokenizer library: its parts are checked and the tokenizer is built from them, so that
neither a regular expression nor a truncation rule of the file takes effect unseen.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path

from tokenwire.text.errors import TokenizerError, UnsupportedTokenizerError
from tokenwire.text.gguf_bpe import end_ids
from tokenwire.text.metadata import Metadata, get_bool, get_strings, get_token_id
from tokenwire.text.pre_tokenizers import normalizer_is_nfc, pre_tokenizer_from_json
from tokenwire.text.tokenizer import Tokenizer
from tokenwire.text.vocabulary import MAX_VOCAB_SIZE, Parts, TokenType, split_merges

MAX_FILE_BYTES = 128 << 20
MAX_ADDED_TOKEN_CHARS = 1024


def load_hf_json(path: Path, metadata: Metadata, *, deferred: bool = False) -> Tokenizer:
    """The tokenizer of a tokenizer.json, with the special ids that the model file names; `deferred` as `Tokenizer`'s.

    Raises:
        TokenizerError: the file is malformed, or disagrees with the vocabulary in the model file.
        UnsupportedTokenizerError: it describes something other than byte-level BPE with known patterns.
    """
    root = _read(path)
    warnings = [
        f"the {name} section of tokenizer.json is ignored" for name in ("truncation", "padding") if root.get(name)
    ]
    model = _object(root.get("model"), "model")
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedTokenizerError("model_type", f"tokenizer model {str(model.get('type'))[:64]!r} is unsupported")
    for option in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "dropout"):
        if model.get(option):
            raise UnsupportedTokenizerError("model_option", f"the BPE option {option} is not supported")
    tokens, types, lstrip, rstrip = _vocabulary(model, root.get("added_tokens"))
    padding = _num_rows(tokens, metadata) - len(tokens)
    tokens += [""] * padding
    types += [TokenType.UNUSED] * padding
    add_bos = get_bool(metadata, "tokenizer.ggml.add_bos_token")
    bos_id = get_token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens))
    return Tokenizer(
        Parts(
            kind="hf-json",
            tokens=tokens,
            types=types,
            merges=_merges(model.get("merges")),
            pre_tokenizer=pre_tokenizer_from_json(root.get("pre_tokenizer")),
            nfc=normalizer_is_nfc(root.get("normalizer")),
            ignore_merges=model.get("ignore_merges") is True,
            add_bos=_adds_bos(root.get("post_processor"), tokens, bos_id) if add_bos is None else add_bos,
            bos_id=bos_id,
            eos_id=get_token_id(metadata, "tokenizer.ggml.eos_token_id", len(tokens)),
            eos_ids=end_ids(metadata, len(tokens)),
            lstrip=lstrip,
            rstrip=rstrip,
            warnings=warnings,
        ),
        deferred=deferred,
    )


def _read(path: Path) -> dict[str, object]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise TokenizerError("not_a_file", "tokenizer.json is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise TokenizerError("too_large", f"tokenizer.json has {status.st_size} bytes, limit {MAX_FILE_BYTES}")
        return _object(json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates), "the file")
    except OSError as error:
        raise TokenizerError("unreadable", f"tokenizer.json cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError("not_json", f"tokenizer.json is not valid JSON: {type(error).__name__}") from error


def _object(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TokenizerError("section_type", f"{name} of tokenizer.json must be an object")
    return value


def _vocabulary(
    model: dict[str, object], added: object
) -> tuple[list[str], list[TokenType], frozenset[int], frozenset[int]]:
    """Spellings and types by id, and the control tokens that swallow white space before and after them."""
    by_id: dict[int, str] = {}
    for spelling, number in _object(model.get("vocab"), "model.vocab").items():
        token_id = _token_id(number)
        if token_id in by_id:
            raise TokenizerError("token_id_duplicate", f"two tokens have the id {token_id}")
        by_id[token_id] = spelling
    types: dict[int, TokenType] = {}
    strips: dict[str, set[int]] = {"lstrip": set(), "rstrip": set()}
    if added is not None and not isinstance(added, list):
        raise TokenizerError("section_type", "added_tokens of tokenizer.json must be an array")
    for entry in added or []:
        token = _object(entry, "an added token")
        text, token_id = token.get("content"), _token_id(token.get("id"))
        if not isinstance(text, str) or not 0 < len(text) <= MAX_ADDED_TOKEN_CHARS:
            raise TokenizerError(
                "added_token_text", f"an added token must have 1 to {MAX_ADDED_TOKEN_CHARS} characters"
            )
        if token.get("single_word"):
            raise UnsupportedTokenizerError("added_token_option", "single_word added tokens are not supported")
        if token_id in types or by_id.get(token_id, text) != text:
            raise TokenizerError("token_id_duplicate", f"two tokens have the id {token_id}")
        special = token.get("special") is True
        by_id[token_id] = text
        types[token_id] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        for name, ids in strips.items():
            if token.get(name) is True:
                if not special:
                    raise UnsupportedTokenizerError("added_token_option", f"{name} of text tokens is not supported")
                ids.add(token_id)
    if not by_id:
        raise TokenizerError("vocabulary_empty", "the vocabulary is empty")
    size = max(by_id) + 1
    if len(by_id) != size:
        raise TokenizerError("vocabulary_holes", f"the vocabulary has {len(by_id)} tokens but ids up to {size - 1}")
    tokens = [by_id[token_id] for token_id in range(size)]
    kinds = [types.get(token_id, TokenType.NORMAL) for token_id in range(size)]
    return tokens, kinds, frozenset(strips["lstrip"]), frozenset(strips["rstrip"])


def _token_id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_VOCAB_SIZE:
        raise TokenizerError("token_id_invalid", f"a token id is not an integer from 0 to {MAX_VOCAB_SIZE - 1}")
    return value


def _merges(merges: object) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise TokenizerError("merges_missing", "model.merges of tokenizer.json must be an array")
    if all(isinstance(entry, str) for entry in merges):
        return split_merges(merges)
    pairs: list[tuple[str, str]] = []
    for rank, entry in enumerate(merges):
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) and part for part in entry):
            raise TokenizerError("merge_malformed", f"merge {rank} is not a pair of tokens")
        pairs.append((entry[0], entry[1]))
    return pairs


def _adds_bos(post_processor: object, tokens: list[str], bos_id: int | None) -> bool:
    """Whether a single text begins with the BOS token, by a TemplateProcessing section alone or in a Sequence."""
    if not isinstance(post_processor, dict) or bos_id is None:
        return False
    processors = post_processor.get("processors") if post_processor.get("type") == "Sequence" else [post_processor]
    for processor in processors if isinstance(processors, list) else []:
        single = processor.get("single") if isinstance(processor, dict) else None
        first = single[0] if isinstance(single, list) and single else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(special, dict) and special.get("id") == tokens[bos_id]:
            return True
    return False


def _num_rows(tokens: list[str], metadata: Metadata) -> int:
    """The length of the model file's vocabulary, which may be padded. Refuses the tokenizer.json of another model."""
    expected = get_strings(metadata, "tokenizer.ggml.tokens")
    if expected is None:
        declared = metadata.get(f"{metadata.get('general.architecture')}.vocab_size")
        num_rows = declared if isinstance(declared, int) else len(tokens)
    else:
        num_rows = len(expected)
        for token_id, (ours, theirs) in enumerate(zip(tokens, expected, strict=False)):
            if ours != theirs:
                raise TokenizerError("tokenizer_model_mismatch", f"token {token_id} differs from the model file's")
    if not len(tokens) <= num_rows <= MAX_VOCAB_SIZE:
        message = f"tokenizer.json has {len(tokens)} tokens, the model file {num_rows}"
        raise TokenizerError("tokenizer_model_mismatch", message)
    return num_rows


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise TokenizerError("key_duplicate", "an object of tokenizer.json has the same key twice")
    return result
