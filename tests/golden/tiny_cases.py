"""The tiny random models whose logits tiny_logits.npz holds: what make_tiny.py builds and what the tests rebuild."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unit.gguf_builder import TinyModel, tiny_llama

NUM_TOKENS = 280
# Beside the ends: around the border of a block of 16, and of the 256 positions that attention splits at.
KEPT_POSITIONS = (0, 1, 15, 16, 130, 255, 256, 279)
CONTEXT = 320


def llama3_rope_factors(
    head_dim: int, base: float, *, factor: float, low: float, high: float, original_context: int
) -> list[float]:
    """Llama 3's context extension as GGUF stores it: what each angle is divided by, `[head_dim / 2]`.

    Waves shorter than `original_context / high` positions stay, longer than `original_context / low` are stretched by
    `factor`, and those between are interpolated.
    """
    factors = []
    for i in range(head_dim // 2):
        waves = original_context / (2 * np.pi * base ** (2 * i / head_dim))
        smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
        factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return factors


@dataclass(frozen=True, slots=True)
class TinyCase:
    """One model.

    Attributes:
        model: arguments of `tiny_llama`.
        rope_scaling: transformers' name for what `rope_factors` does.
    """

    name: str
    model: dict[str, Any]
    rope_scaling: dict[str, Any] = field(default_factory=dict)

    def build(self, path: Path) -> TinyModel:
        return tiny_llama(path, context=CONTEXT, **self.model)

    def token_ids(self, vocab_size: int) -> list[int]:
        return [int(i) for i in np.random.default_rng(len(self.name)).integers(0, vocab_size, NUM_TOKENS)]


_WIDE: dict[str, Any] = {"n_embd": 256, "n_ff": 512, "n_heads": 4, "n_kv_heads": 2}
_QWEN2: dict[str, Any] = {"architecture": "qwen2", "rope_base": 1e6, "rms_eps": 1e-6}
_STRETCH: dict[str, Any] = {"factor": 8.0, "low": 1.0, "high": 4.0, "original_context": 64}

CASES = (
    TinyCase("llama-tied-f32", {"seed": 1}),
    TinyCase("llama-untied-f32", {"seed": 2, "tied": False, "n_kv_heads": 1, "head_dim": 32}),
    TinyCase("llama-untied-f16", {"seed": 3, "tied": False, "dtype": "F16"}),
    TinyCase("llama-no-gqa-q8_0", {"seed": 4, "dtype": "Q8_0", "n_kv_heads": 4}),
    TinyCase(
        "llama-stretched-rope-f32",
        {"seed": 5, "rope_base": 5e5, "rope_factors": llama3_rope_factors(16, 5e5, **_STRETCH)},
        {
            "rope_type": "llama3",
            "factor": _STRETCH["factor"],
            "low_freq_factor": _STRETCH["low"],
            "high_freq_factor": _STRETCH["high"],
            "original_max_position_embeddings": _STRETCH["original_context"],
        },
    ),
    TinyCase("qwen2-tied-f32", {"seed": 6, **_QWEN2}),
    TinyCase("qwen2-untied-f16", {"seed": 7, "tied": False, "dtype": "F16", **_QWEN2}),
    TinyCase("qwen2-tied-q8_0", {"seed": 8, "dtype": "Q8_0", **_QWEN2}),
    TinyCase("qwen2-tied-q5_0", {"seed": 9, "dtype": "Q5_0", **_QWEN2}),
    TinyCase("qwen2-tied-q4_k", {"seed": 10, "dtype": "Q4_K", **_QWEN2, **_WIDE}),
    TinyCase("qwen2-tied-q6_k", {"seed": 11, "dtype": "Q6_K", **_QWEN2, **_WIDE}),
    TinyCase("llama-untied-q5_k", {"seed": 12, "tied": False, "dtype": "Q5_K", **_WIDE}),
)
