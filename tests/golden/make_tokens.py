# ruff: noqa: S310, T201  (a script: it prints, and asks the server that it was given)
"""Makes tokens.json and chats.json: token ids and chat renderings by Hugging Face transformers from the same GGUF file.

Run it where make_reference.py runs:

    python make_tokens.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf [--check-llama-server http://127.0.0.1:8080]

The tokenizer is transformers' for this file, with the pre-tokenizer that the file names (see `load_tokenizer`). Special
tokens in text are plain text (`split_special_tokens`). With `--check-llama-server` (a llama.cpp server on the same
file) each vector is compared with an independent tokenizer; vectors on which the two differ are printed.
"""

import argparse
import hashlib
import json
import urllib.request
from pathlib import Path

from make_reference import HERE, load_tokenizer

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
]  # fmt: skip

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t\t x \t\n  y\r\n\r\nz",
    "Hello, world!",
    "hello",
    " hello",
    "The quick brown fox jumps over the lazy dog; it's 7:45 o'clock & they'll don't we've I'm you'd HE'LL",
    "def f(x: int) -> list[int]:\n    return [i**2 for i in range(x) if i % 2 == 0]\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 3.14e-10f; }  // done",
    "\t\tif (!ok)\n\t\t\treturn -1;\n",
    "12345 67,890.12 0x1F 3.14159 1e100 ½ ² ٣ Ⅷ",
    "list:\n\n1. one\n\n2. two   3  4\t5",
    "  12",
    "价格是 3.5 元，今天是2024年5月17日。",
    "日本語のテキスト、カタカナ、ひらがな。",
    "한국어 문장입니다.",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "Привет, мир! Ёлка",
    "नमस्ते दुनिया",
    "ภาษาไทย",
    "😀😃😄 🇧🇷🇯🇵 👩‍💻 👨‍👩‍👧‍👦 👍🏽 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "e\u0301 \u00e9 a\u0308\u0323 Z\u0351\u0358\u0302 \u1e9b\u0323",
    "zero\u200bwidth\u200djoin \ufefffeff \u2028line \u2029para \u00a0nbsp\u3000ideographic",
    "nul\x00bell\x07esc\x1b[0m del\x7f",
    "dropped: \x04 \x06 \x13 \x14 \x16 \x1d",
    "\U0001d54f\U0001f9d1\u200d\U0001f680 \U000e0041 \U0010ffff",
    "ﬁ ﬂ ＡＢＣ１２３ ｶﾅ ∀x∈ℝ: ⌈x⌉",
    "https://example.com/a/b?c=d&e=%20f#g user.name+tag@example.org",
    "{\"a\": [1, 2.5, null, true], \"b\": {\"c\": \"\\u00e9\\n\"}}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ababababababababababababababababababababababababab",
    "                                                                                x",
    "x                                                                                ",
    "^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^",
    "<|im_start|>system\nignore<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end", "im_end|>", "<||im_end||>", "< |im_end| >", "<|IM_END|>",
    "</s> [INST] <<SYS>> {{ user }} {% raw %} %s <|eot_id|>",
    *SPECIAL,
    *[f"a {token} b" for token in SPECIAL],
    "".join(SPECIAL),
]  # fmt: skip

LONG = {
    "sentence x 400": "It was the best of times, it was the worst of times, it was the age of wisdom. " * 400,
    "numbers to 3000": " ".join(str(n) for n in range(3000)),
    "all of the basic plane from U+0020 in steps of 7": "".join(
        chr(c) for c in range(0x20, 0xFFFE, 7) if not 0xD800 <= c <= 0xDFFF
    ),
    "every letter pair": " ".join(a + b for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"),
}

CHATS = [
    [("user", "Hello")],
    [("system", "You are terse."), ("user", "What is 2 + 2?")],
    [("user", "Hi"), ("assistant", "Hello! How can I help?"), ("user", "Write a haiku about GPU computing")],
    [("system", ""), ("user", "")],
    [("user", "  leading and trailing white space \n\n")],
    [("user", "\n\nstarts with newlines"), ("assistant", "ends with one\n"), ("user", "1. digits first")],
    [("user", "多言語 😀 مرحبا e\u0301"), ("assistant", "…"), ("user", "def f():\n\treturn {'a': 1}\n")],
    [("system", "A" * 500), ("user", "quotes \"'` and braces {{ }} {% %} {# #} & <b>html</b>")],
]


def llama_server_ids(url: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
    request = urllib.request.Request(f"{url}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["tokens"]


def digest(ids: list[int]) -> str:
    return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--check-llama-server", metavar="URL")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    vectors = [{"text": text, "ids": encode(text)} for text in TEXTS]
    for path in sorted((HERE / "texts").glob("*.txt")):
        ids = encode(path.read_text("utf-8"))
        vectors.append({"file": path.name, "count": len(ids), "sha256": digest(ids)})
    for name, text in LONG.items():
        ids = encode(text)
        vectors.append({"long": name, "text": text, "count": len(ids), "sha256": digest(ids)})
    (HERE / "tokens.json").write_text(json.dumps(vectors, ensure_ascii=True, indent=0) + "\n", "utf-8")

    chats = []
    for conversation in CHATS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        chats.append({"messages": conversation, "text": text, "ids": ids})
    (HERE / "chats.json").write_text(json.dumps(chats, ensure_ascii=True, indent=0) + "\n", "utf-8")
    print(f"{len(vectors)} texts, {len(chats)} conversations")

    if args.check_llama_server:
        texts = [*TEXTS, *LONG.values(), *(p.read_text("utf-8") for p in sorted((HERE / "texts").glob("*.txt")))]
        different = [text for text in texts if encode(text) != llama_server_ids(args.check_llama_server, text)]
        print(f"{len(texts) - len(different)} of {len(texts)} texts agree with llama.cpp")
        for text in different:
            print(ascii(text[:100]))


if __name__ == "__main__":
    main()
