"""Byte-level BPE vocabularies of any size for any text: bytes, then sequences of letters, then special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

NORMAL, CONTROL, UNUSED = 1, 3, 5

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3_CHAT = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos_id: int
    eos_id: int
    add_bos: bool
    chat_template: str


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: printable ones for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


def _regular(count: int) -> tuple[list[str], list[str]]:
    """`count` tokens and their merges: the 256 bytes, then words that add a letter to a shorter one, shortest first."""
    tokens = _byte_characters()
    merges: list[str] = []
    letters = "abcdefghijklmnopqrstuvwxyz"
    shorter = ["Ġ", *letters]
    while len(tokens) < count:
        longer = []
        for start, letter in product(shorter, letters):
            if len(tokens) == count:
                break
            merges.append(f"{start} {letter}")
            tokens.append(start + letter)
            longer.append(start + letter)
        shorter = longer
    return tokens, merges


def _vocabulary(
    size: int, specials: list[str], *, pre: str, bos: str, eos: str, add_bos: bool, chat_template: str, unused: int
) -> Vocabulary:
    tokens, merges = _regular(size - len(specials) - unused)
    types = [NORMAL] * len(tokens) + [CONTROL] * len(specials) + [UNUSED] * unused
    tokens += specials
    ids = {token: len(tokens) - len(specials) + i for i, token in enumerate(specials)}
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(unused)]
    return Vocabulary(pre, tokens, types, merges, ids[bos], ids[eos], add_bos, chat_template)


def qwen2_vocabulary(size: int) -> Vocabulary:
    """Qwen 2.5's special tokens, at their own ids if `size` is 151,936."""
    return _vocabulary(
        size,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        pre="qwen2",
        bos="<|endoftext|>",
        eos="<|im_end|>",
        add_bos=False,
        chat_template=_CHATML,
        unused=290,
    )


def llama3_vocabulary(size: int) -> Vocabulary:
    """Llama 3's 256 special tokens, at their own ids if `size` is 128,256."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    return _vocabulary(
        size,
        [f"<|{named.get(i, f'reserved_special_token_{i}')}|>" for i in range(256)],
        pre="llama-bpe",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        add_bos=True,
        chat_template=_LLAMA3_CHAT,
        unused=0,
    )
