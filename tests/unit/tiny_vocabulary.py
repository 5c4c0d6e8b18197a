"""A tiny vocabulary, as a model file holds it."""

# GPT-2 spells the bytes 0x21 to 0x7E as themselves, the space as Ġ and the line feed as Ċ.
LETTERS = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ", "Ã", "©"]


WORDS = ["he", "ll", "hell", "hello", "Ġh", "Ġhello"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ h", "Ġ hello"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROL, *LETTERS, *WORDS]


class FakeFile:
    """Metadata in memory, as `_native.GgufFile` gives it."""

    def __init__(self, **changes: object) -> None:
        values: dict[str, object] = {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
        }
        values |= {"tokenizer.ggml." + name: value for name, value in changes.items()}
        self.values = {key: value for key, value in values.items() if value is not None}

    def keys(self) -> list[str]:
        return list(self.values)

    def get(self, key: str) -> object:
        return self.values.get(key)

    def get_bytes(self, key: str) -> list[bytes] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise TypeError(key)
        return [item if isinstance(item, bytes) else str(item).encode() for item in value]


def ids_of(*spellings: str) -> list[int]:
    return [TOKENS.index(spelling) for spelling in spellings]


def types(**kinds: int) -> list[int]:
    return [kinds.get(token, 3 if token in CONTROL else 1) for token in TOKENS]
