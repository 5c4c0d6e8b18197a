"""Malformed and unusual tokenizers of model files, on a tiny vocabulary."""

import itertools
from pathlib import Path

import pytest

from tokenwire.text import TokenizerError, UnsupportedTokenizerError, load_text, load_tokenizer
from tokenwire.text.pre_tokenizers import PRE_TOKENIZERS
from unit.tiny_vocabulary import TOKENS, FakeFile, ids_of, types


def test_merges_apply_in_order_of_rank() -> None:
    tokenizer = load_tokenizer(FakeFile())
    assert tokenizer.encode("hello hello\n") == ids_of("hello", "Ġhello", "Ċ")
    assert tokenizer.encode("é") == ids_of("Ã", "©")
    assert tokenizer.decode(tokenizer.encode("hello é\n")) == "hello é\n"


def test_bos_is_added_where_the_file_asks() -> None:
    pipeline = load_text(FakeFile(add_bos_token=True), Path("model.gguf"))
    assert pipeline.encode_prompt("hello") == [1, *ids_of("hello")]
    assert pipeline.count_tokens("hello") == 1


def test_a_pre_tokenizer_has_its_own_default_for_bos() -> None:
    assert load_tokenizer(FakeFile(pre="llama-bpe", add_bos_token=None)).add_bos is True
    assert load_tokenizer(FakeFile(pre="qwen2", add_bos_token=None)).add_bos is False


def test_named_ends_of_turn_stop_a_generation() -> None:
    tokenizer = load_tokenizer(FakeFile(eot_token_id=10, eom_token_id=11))
    assert tokenizer.stop_token_ids == [0, 2, 10, 11]


def test_user_defined_tokens_are_matched_in_text_and_stand_for_it() -> None:
    tokens = [*TOKENS, "¡whole!"]
    kinds = [*types(), 4]
    tokenizer = load_tokenizer(FakeFile(tokens=tokens, token_type=kinds))
    assert tokenizer.encode("hello¡whole!") == [*ids_of("hello"), len(TOKENS)]
    assert tokenizer.vocabulary()[-1] == "¡whole!".encode()


def test_markers_declared_user_defined_are_control_tokens() -> None:
    tokens = [*TOKENS, "<|turn|>"]
    tokenizer = load_tokenizer(FakeFile(tokens=tokens, token_type=[*types(), 4]))
    assert "<|turn|>" in tokenizer.control_tokens
    assert len(TOKENS) not in tokenizer.encode("<|turn|>")
    assert tokenizer.vocabulary()[-1] == b""


def test_padding_may_repeat_and_stands_for_nothing() -> None:
    tokenizer = load_tokenizer(FakeFile(tokens=[*TOKENS, "[PAD]", "[PAD]"], token_type=[*types(), 5, 5]))
    assert tokenizer.vocab_size == len(TOKENS) + 2
    assert tokenizer.vocabulary()[-2:] == [b"", b""]


def test_a_file_without_pre_tokenizer_is_read_as_gpt2_with_a_warning() -> None:
    tokenizer = load_tokenizer(FakeFile(pre=None))
    assert tokenizer.encode("hello") == ids_of("hello")
    assert len(tokenizer.warnings) == 1


def test_every_pre_tokenizer_keeps_every_character() -> None:
    sample = "Hello  world\n\n 12345 don't ÀÉ 日本語 😀\t\r\n  x  "
    for name, row in PRE_TOKENIZERS.items():
        words = row.build().pre_tokenize_str(sample)
        spans = [span for _, span in words]
        assert spans[0][0] == 0, name
        assert spans[-1][1] == len(sample), name
        assert all(left[1] == right[0] for left, right in itertools.pairwise(spans)), name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["a", "Ġ", "Ġ12345", "'ll"]),
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4", "5", "'ll"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "123", "45", "'ll"]),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2", "3", "4", "5", "'ll"]),
    ],
)
def test_digits_are_cut_as_the_model_names_it(name: str, words: list[str]) -> None:
    actual = [word for word, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str("a  12345'll")]
    assert actual == words


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("tokenizer_missing", {"model": None}),
        ("vocabulary_missing", {"tokens": None}),
        ("merges_missing", {"merges": None}),
        ("vocabulary_empty", {"tokens": [], "token_type": [], "bos_token_id": None, "eos_token_id": None}),
        ("vocabulary_empty", {"token_type": [3] * len(TOKENS)}),
        ("token_duplicate", {"tokens": [*TOKENS[:-1], "hello"]}),
        ("token_empty", {"tokens": [*TOKENS[:-1], ""]}),
        ("token_utf8", {"tokens": [*TOKENS[:-1], b"\xff\xfe"]}),
        ("token_types_length", {"token_type": [1, 1]}),
        ("token_type_unknown", {"token_type": [9] * len(TOKENS)}),
        ("metadata_type", {"token_type": ["a"] * len(TOKENS)}),
        ("metadata_type", {"tokens": 3}),
        ("metadata_type", {"pre": 7}),
        ("metadata_type", {"bos_token_id": "1"}),
        ("metadata_type", {"add_bos_token": 1}),
        ("special_id_out_of_range", {"eos_token_id": len(TOKENS)}),
        ("special_id_out_of_range", {"bos_token_id": -1}),
        ("special_id_out_of_range", {"eot_token_id": 1 << 40}),
        ("bos_missing", {"bos_token_id": None, "add_bos_token": True}),
        ("merge_malformed", {"merges": ["he"]}),
        ("merge_malformed", {"merges": ["h  e"]}),
        ("merge_malformed", {"merges": [" he"]}),
        ("merge_malformed", {"merges": ["h e l"]}),
        ("merge_unknown_token", {"merges": ["h zz"]}),
        ("merge_unknown_token", {"merges": ["h h"]}),
        ("merge_unknown_token", {"merges": ["< |im_end|>"]}),
        ("token_too_long", {"tokens": [*TOKENS[:-1], "x" * 20000]}),
    ],
)
def test_a_malformed_vocabulary_is_refused(check: str, changes: dict[str, object]) -> None:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(FakeFile(**changes))
    assert caught.value.check == check
    assert caught.value.code == "MODEL_LOAD_FAILED"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("check", "changes", "named"),
    [
        ("unknown_pre_tokenizer", {"pre": "martian"}, "martian"),
        ("tokenizer_model", {"model": "llama"}, "gguf-spm"),
        ("tokenizer_model", {"model": "rwkv"}, "rwkv"),
    ],
)
def test_an_unsupported_tokenizer_is_named(check: str, changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedTokenizerError, match=named) as caught:
        load_tokenizer(FakeFile(**changes))
    assert (caught.value.check, caught.value.code) == (check, "UNSUPPORTED_MODEL")


def test_the_documentation_names_every_pre_tokenizer() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    paragraph = page.split("Pre-tokenizers:")[1].split(". Regular")[0]
    assert {name.strip("`\n ") for name in paragraph.split(",")} == set(PRE_TOKENIZERS)
