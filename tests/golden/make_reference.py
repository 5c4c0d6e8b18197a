# ruff: noqa: T201  (a script: it prints)
"""Makes reference_logits.npz: Hugging Face transformers in float32 on the same GGUF file, teacher-forced.

Run it in an environment with torch, transformers, accelerate and gguf (none of them is a dependency of tokenwire):

    python make_reference.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

For the text called `name` (tests/golden/texts/name.*) the archive holds, with n tokens:

    name.ids      uint16  [n]              the text's tokens, as the model's own tokenizer gives them
    name.top1     uint16  [n - 1]          the reference's most probable next token at every position but the last
    name.nll      float64 []               -sum log p(ids[t + 1] | ids[:t + 1])
    name.pos      uint16  [m]              the positions whose top 20 are kept: each of a text of up to 256 tokens, else
                                           every fourth
    name.top_ids  uint16  [m, 20]          ids, most probable first
    name.top_logp float16 [m, 20]          their natural log-probabilities
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
TOP = 20
FULL_UP_TO = 256


def load_tokenizer(model: Path):
    """The file's tokenizer, with the pre-tokenizer that the file names (`smollm`).

    Reading a GGUF, transformers ignores `tokenizer.ggml.pre` and falls back to GPT-2's pre-tokenizer; the model was
    trained with digits split off first, which changes white space before digits.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def text_ids(tokenizer, path: Path) -> list[int]:
    if path.suffix == ".json":
        rendered = tokenizer.apply_chat_template(json.loads(path.read_text("utf-8")), tokenize=False)
        return tokenizer.encode(rendered, add_special_tokens=False)
    return tokenizer.encode(path.read_text("utf-8"), add_special_tokens=False, split_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, default=HERE / "reference_logits.npz")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model.parent, gguf_file=args.model.name, dtype=torch.float32)
    model.eval()
    arrays: dict[str, np.ndarray] = {}
    total = 0
    for path in sorted((HERE / "texts").iterdir()):
        ids = text_ids(tokenizer, path)
        started = time.monotonic()
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        logp = torch.log_softmax(logits, dim=-1)
        nll = -logp.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        step = 1 if len(ids) <= FULL_UP_TO else 4
        pos = np.arange(0, len(ids) - 1, step)
        top = torch.topk(logp[pos], TOP, dim=-1)
        name = path.stem
        arrays[f"{name}.ids"] = np.array(ids, np.uint16)
        arrays[f"{name}.top1"] = logp.argmax(-1).numpy().astype(np.uint16)
        arrays[f"{name}.nll"] = np.array(nll, np.float64)
        arrays[f"{name}.pos"] = pos.astype(np.uint16)
        arrays[f"{name}.top_ids"] = top.indices.numpy().astype(np.uint16)
        arrays[f"{name}.top_logp"] = top.values.numpy().astype(np.float16)
        total += len(ids)
        print(f"{name}: {len(ids)} tokens, nll/token {nll / (len(ids) - 1):.3f}, {time.monotonic() - started:.1f} s")
    np.savez_compressed(args.output, **arrays)
    print(f"{total} tokens, {args.output.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
