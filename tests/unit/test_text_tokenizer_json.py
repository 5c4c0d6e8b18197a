"""Malformed and unusual tokenizer.json files, on a tiny vocabulary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenwire.text import TokenizerError, UnsupportedTokenizerError, load_text, load_tokenizer
from tokenwire.text.pre_tokenizers import LLAMA3, QWEN2
from unit.tiny_vocabulary import CONTROL, MERGES, TOKENS, FakeFile, ids_of


def hf_json(**changes: Any) -> dict[str, Any]:
    root: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, "special": True, "normalized": False} for i, t in enumerate(CONTROL)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(TOKENS)}, "merges": MERGES},
    }
    model = changes.pop("model", {})
    root |= changes
    root["model"] = root["model"] | model
    return root


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def write_file(content: Any) -> Path:
        path = tmp_path / "tokenizer.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content), "utf-8")
        return path

    return write_file


def test_tokenizer_json_gives_the_ids_that_the_model_file_gives(write: Callable[[Any], Path]) -> None:
    ours = load_tokenizer(FakeFile(), write(hf_json()))
    theirs = load_tokenizer(FakeFile())
    assert ours.kind == "hf-json"
    for text in ("hello hello 12  34\n", "<|im_end|> é", ""):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.vocabulary() == theirs.vocabulary()
    assert ours.stop_token_ids == theirs.stop_token_ids


def test_merges_may_be_pairs(write: Callable[[Any], Path]) -> None:
    path = write(hf_json(model={"merges": [merge.split(" ") for merge in MERGES]}))
    assert load_tokenizer(FakeFile(), path).encode("hello") == ids_of("hello")


def test_truncation_and_padding_are_ignored_with_a_warning(write: Callable[[Any], Path]) -> None:
    path = write(hf_json(truncation={"max_length": 2}, padding={"pad_id": 0, "strategy": {"Fixed": 50}}))
    tokenizer = load_tokenizer(FakeFile(), path)
    assert tokenizer.encode("a b c d e") == ids_of("a", "Ġ", "b", "Ġ", "c", "Ġ", "d", "Ġ", "e")
    assert len(tokenizer.warnings) == 2


def test_a_template_post_processor_asks_for_bos(write: Callable[[Any], Path]) -> None:
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    path = write(hf_json(post_processor={"type": "TemplateProcessing", "single": single}))
    assert load_tokenizer(FakeFile(add_bos_token=None), path).add_bos is True
    assert load_tokenizer(FakeFile(add_bos_token=False), path).add_bos is False


def test_a_shorter_tokenizer_json_is_padded_to_the_model_file(write: Callable[[Any], Path]) -> None:
    file = FakeFile(tokens=[*TOKENS, "[PAD1]", "[PAD2]"], token_type=None)
    tokenizer = load_tokenizer(file, write(hf_json()))
    assert tokenizer.vocab_size == len(TOKENS) + 2
    assert tokenizer.vocabulary()[-1] == b""


def test_control_tokens_may_swallow_white_space(write: Callable[[Any], Path]) -> None:
    added = [
        {"id": 0, "content": CONTROL[0], "special": True},
        {"id": 1, "content": CONTROL[1], "special": True, "rstrip": True},
        {"id": 2, "content": CONTROL[2], "special": True, "lstrip": True},
    ]
    tokenizer = load_tokenizer(FakeFile(), write(hf_json(added_tokens=added)))
    pieces = tokenizer.split_control("<|im_start|> \nhello \n<|im_end|> hello")
    assert tokenizer.encode_pieces(pieces) == [1, *ids_of("hello"), 2, *ids_of("Ġhello")]


def test_tokenizer_json_beside_the_file_serves_where_its_own_does_not(write: Callable[[Any], Path]) -> None:
    model_path = write(hf_json()).with_name("model.gguf")
    assert load_text(FakeFile(), model_path).kind == "gguf-bpe"
    assert load_text(FakeFile(pre="martian"), model_path).kind == "hf-json"
    with pytest.raises(UnsupportedTokenizerError):
        load_text(FakeFile(pre="martian"), Path("/nonexistent/model.gguf"))


VOCAB = {token: i for i, token in enumerate(TOKENS)}


@pytest.mark.parametrize(
    ("check", "content"),
    [
        ("not_json", b""),
        ("not_json", b'{"model": {"type": "BPE"'),
        ("not_json", b"[" * 10_000 + b"]" * 10_000),
        ("not_json", b"\xff\xff"),
        ("not_json", b'{"model": ' + b"9" * 5000 + b"}"),
        ("section_type", b"[]"),
        ("section_type", {"model": 3}),
        ("key_duplicate", b'{"model": {"vocab": {"a": 0, "a": 1}}}'),
        ("vocabulary_empty", hf_json(model={"vocab": {}}, added_tokens=[])),
        ("token_id_invalid", hf_json(model={"vocab": VOCAB | {"zz": -1}})),
        ("token_id_invalid", hf_json(model={"vocab": VOCAB | {"zz": 1 << 40}})),
        ("token_id_invalid", hf_json(model={"vocab": VOCAB | {"zz": True}})),
        ("token_id_invalid", hf_json(model={"vocab": VOCAB | {"zz": 1.5}})),
        ("token_id_duplicate", hf_json(model={"vocab": VOCAB | {"zz": 5}})),
        ("vocabulary_holes", hf_json(model={"vocab": VOCAB | {"zz": len(VOCAB) + 7}})),
        ("merge_malformed", hf_json(model={"merges": ["he"]})),
        ("merge_malformed", hf_json(model={"merges": [["h", "e", "l"]]})),
        ("merge_malformed", hf_json(model={"merges": [["h", 3]]})),
        ("merges_missing", hf_json(model={"merges": {}})),
        ("merge_unknown_token", hf_json(model={"merges": ["q zz"]})),
        ("merge_unknown_token", hf_json(model={"merges": [["h" * 100_000, "e"]]})),
        ("added_token_text", hf_json(added_tokens=[{"id": 0, "content": ""}])),
        ("added_token_text", hf_json(added_tokens=[{"id": 0, "content": "x" * (1 << 20)}])),
        ("token_id_duplicate", hf_json(added_tokens=[{"id": 0, "content": "<|other|>", "special": True}])),
        ("token_id_duplicate", hf_json(added_tokens=[{"id": 0, "content": CONTROL[0], "special": True}] * 2)),
        ("token_duplicate", hf_json(added_tokens=[{"id": len(TOKENS), "content": "hello"}])),
        ("tokenizer_model_mismatch", hf_json(added_tokens=[{"id": len(TOKENS), "content": "more"}])),
        ("tokenizer_model_mismatch", hf_json(model={"vocab": VOCAB | {"a": VOCAB["b"], "b": VOCAB["a"]}})),
    ],
)
def test_a_malformed_tokenizer_json_is_refused(check: str, content: Any, write: Callable[[Any], Path]) -> None:
    file = FakeFile(tokens=None, bos_token_id=None, eos_token_id=None) if check == "token_duplicate" else FakeFile()
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(file, write(content))
    assert caught.value.check == check
    assert caught.value.code == "MODEL_LOAD_FAILED"
    assert len(str(caught.value)) < 300


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }


@pytest.mark.parametrize(
    ("check", "content"),
    [
        ("model_type", hf_json(model={"type": "Unigram"})),
        ("model_type", hf_json(model={"type": "WordPiece"})),
        ("model_option", hf_json(model={"byte_fallback": True})),
        ("regex_not_allowed", hf_json(pre_tokenizer=split("(a+)+$"))),
        ("regex_not_allowed", hf_json(pre_tokenizer=split(LLAMA3 + "|x"))),
        ("pre_tokenizer_kind", hf_json(pre_tokenizer={"type": "Metaspace"})),
        ("pre_tokenizer_kind", hf_json(pre_tokenizer={"type": "Digits", "individual_digits": True})),
        ("normalizer_kind", hf_json(normalizer={"type": "Lowercase"})),
        ("normalizer_kind", hf_json(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+"}, "content": ""})),
        ("added_token_option", hf_json(added_tokens=[{"id": 0, "content": CONTROL[0], "single_word": True}])),
    ],
)
def test_an_unsupported_tokenizer_json_is_refused(check: str, content: Any, write: Callable[[Any], Path]) -> None:
    with pytest.raises(UnsupportedTokenizerError) as caught:
        load_tokenizer(FakeFile(), write(content))
    assert caught.value.check == check


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN2])
def test_published_patterns_are_allowed(pattern: str, write: Callable[[Any], Path]) -> None:
    path = write(hf_json(pre_tokenizer=split(pattern), normalizer={"type": "NFC"}))
    assert load_tokenizer(FakeFile(), path).encode("hello e\u0301") == ids_of("hello", "Ġ", "Ã", "©")


def test_a_tokenizer_json_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, check in ((tmp_path, "not_a_file"), (tmp_path / "missing.json", "unreadable")):
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(FakeFile(), path)
        assert caught.value.check == check


def test_an_oversized_tokenizer_json_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # sparse
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(FakeFile(), path)
    assert caught.value.check == "too_large"
