# ruff: noqa: T201  (a script: it prints)
"""Makes tiny_logits.npz: logits of Hugging Face transformers, float32, for the tiny random models of tiny_cases.py.

Run it in an environment with torch and transformers (neither is a dependency of tokenwire), from any directory:

    python tests/golden/make_tiny.py

The weights themselves are not kept: the test builds the same files again. transformers gets the values that a file's
bytes stand for, so what is compared is the forward pass. For the case called `name` the archive holds

    name.logits    float32 [len(KEPT_POSITIONS), vocab_size]
    name.checksum  float64 []  sum of the absolute weights, to tell other weights from another forward pass
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from golden.tiny_cases import CASES, CONTEXT, KEPT_POSITIONS, TinyCase  # noqa: E402
from unit.gguf_builder import TinyModel  # noqa: E402

_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_NAMES["output.weight"] = "lm_head.weight"


def transformers_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{_LAYER_NAMES[rest]}"
    return _NAMES[name]


def split_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """q or k rows as transformers has them: GGUF's `llama` files store dimensions i and i + d/2 of a head in turns."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(rows.shape)


def load(case: TinyCase, tiny: TinyModel) -> torch.nn.Module:
    settings = {"n_embd": 64, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "n_ff": 128, "tied": True, **case.model}
    head_dim = settings.get("head_dim") or settings["n_embd"] // settings["n_heads"]
    qwen2 = settings.get("architecture") == "qwen2"
    rope = {"rope_type": "default", **case.rope_scaling, "rope_theta": settings.get("rope_base", 10000.0)}
    config = (Qwen2Config if qwen2 else LlamaConfig)(
        vocab_size=tiny.vocab_size,
        hidden_size=settings["n_embd"],
        intermediate_size=settings["n_ff"],
        num_hidden_layers=settings["n_layers"],
        num_attention_heads=settings["n_heads"],
        num_key_value_heads=settings["n_kv_heads"],
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=settings.get("rms_eps", 1e-5),
        tie_word_embeddings=settings["tied"],
        rope_parameters=rope,
        attn_implementation="eager",
    )
    model = (Qwen2ForCausalLM if qwen2 else LlamaForCausalLM)(config)
    state = {}
    for name, values in tiny.weights.items():
        if name == "rope_freqs.weight":
            continue
        if not qwen2 and name.endswith((".attn_q.weight", ".attn_k.weight")):
            values = split_halves(values, head_dim)
        state[transformers_name(name)] = torch.from_numpy(np.array(values, np.float32))
    if settings["tied"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    out: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            tiny = case.build(Path(folder) / "model.gguf")
            model = load(case, tiny)
            with torch.no_grad():
                logits = model(torch.tensor([case.token_ids(tiny.vocab_size)])).logits[0].numpy()
            out[f"{case.name}.logits"] = logits[list(KEPT_POSITIONS)].astype(np.float32)
            total = sum(float(np.abs(values.astype(np.float64)).sum()) for values in tiny.weights.values())
            out[f"{case.name}.checksum"] = np.float64(total)
            print(f"{case.name:26} logits {logits.std():.3f} standard deviation, {np.abs(logits).max():.3f} largest")
    np.savez_compressed(HERE / "tiny_logits.npz", **out)


if __name__ == "__main__":
    main()
