"""The engine against Hugging Face transformers: teacher-forced, float32, the same file (golden/make_reference.py).

Both read the same 25 texts; at each position the engine's distribution of the next token is compared with the
reference's. Bounds: the same most probable token at 97 % of the positions, a mean difference of log-probabilities of at
most 0.10 over the reference's 20 most probable tokens, a perplexity within 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tokenwire import models
from tokenwire._native import EngineOptions, GgufFile, Runner
from tokenwire.text import load_text

GOLDEN = Path(__file__).parent.parent / "golden"
CHUNK_TOKENS = 256
MIN_TOP1_AGREEMENT = 0.97
MAX_MEAN_DELTA = 0.10
MAX_PERPLEXITY_DEVIATION = 0.01

Floats = npt.NDArray[np.float64]


@dataclass
class Comparison:
    """Of one text, or of all together."""

    positions: int = 0
    same_top1: int = 0
    delta_sum: float = 0.0
    delta_count: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0

    def add(self, other: Comparison) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def top1_agreement(self) -> float:
        return self.same_top1 / self.positions

    @property
    def mean_delta(self) -> float:
        return self.delta_sum / self.delta_count

    @property
    def perplexity_ratio(self) -> float:
        return float(np.exp((self.nll - self.reference_nll) / self.positions))

    def __str__(self) -> str:
        return (
            f"{self.positions:5d} positions  top-1 {100 * self.top1_agreement:6.2f} %  "
            f"mean |delta log p| {self.mean_delta:.4f}  perplexity ratio {self.perplexity_ratio:.4f}"
        )


def log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def compare(runner: Runner, sequence: int, golden: dict[str, npt.NDArray[np.generic]]) -> Comparison:
    ids = golden["ids"].astype(np.int64)
    kept = {int(position): row for row, position in enumerate(golden["pos"].astype(np.int64))}
    result = Comparison(reference_nll=float(golden["nll"].astype(np.float64)))
    for start in range(0, len(ids), CHUNK_TOKENS):
        chunk = ids[start : start + CHUNK_TOKENS]
        data = runner.forward(sequence, chunk.tolist(), all_logits=True)
        logits = np.frombuffer(data, np.float32).reshape(len(chunk), runner.model_info.vocab_size)
        assert np.isfinite(logits).all()
        # The last token of the text has no successor to be judged by.
        num_positions = min(len(chunk), len(ids) - 1 - start)
        logp = log_softmax(logits[:num_positions])
        rows = np.arange(num_positions)
        result.positions += num_positions
        result.same_top1 += int((logp.argmax(axis=1) == golden["top1"][start + rows]).sum())
        result.nll -= float(logp[rows, ids[start + 1 + rows]].sum())
        for row in rows:
            kept_row = kept.get(start + int(row))
            if kept_row is not None:
                expected = golden["top_logp"][kept_row].astype(np.float64)
                delta = np.abs(logp[row, golden["top_ids"][kept_row].astype(np.int64)] - expected)
                result.delta_sum += float(delta.sum())
                result.delta_count += len(delta)
    return result


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, npt.NDArray[np.generic]]]:
    texts: dict[str, dict[str, npt.NDArray[np.generic]]] = {}
    with np.load(GOLDEN / "reference_logits.npz", allow_pickle=False) as archive:
        for key in archive.files:
            name, _, kind = key.partition(".")
            texts.setdefault(name, {})[kind] = archive[key]
    return texts


def test_the_golden_set_is_varied_enough(golden: dict[str, dict[str, npt.NDArray[np.generic]]]) -> None:
    lengths = [len(text["ids"]) for text in golden.values()]
    assert len(lengths) >= 20
    assert sum(length > 1000 for length in lengths) >= 3
    assert sum(lengths) > 8000


def test_the_engine_s_tokenizer_gives_the_golden_ids(golden: dict[str, dict[str, npt.NDArray[np.generic]]]) -> None:
    path = models.resolve("smollm2")
    text = load_text(GgufFile(str(path)), path)
    try:
        for source in sorted((GOLDEN / "texts").glob("*.txt")):
            assert text.encode_prompt(source.read_text("utf-8")) == golden[source.stem]["ids"].tolist(), source.name
    finally:
        text.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_logits_agree_with_transformers(
    golden: dict[str, dict[str, npt.NDArray[np.generic]]], capsys: pytest.CaptureFixture[str]
) -> None:
    runner = Runner(GgufFile(str(models.resolve("smollm2"))), EngineOptions())
    total = Comparison()
    lines = []
    for sequence, (name, text) in enumerate(sorted(golden.items())):
        runner.reset()
        result = compare(runner, sequence, text)
        lines.append(f"{name:28s} {result}")
        total.add(result)
    lines.append(f"{'all texts':28s} {total}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))  # noqa: T201  (the figures are the point of this test)
    assert total.top1_agreement >= MIN_TOP1_AGREEMENT
    assert total.mean_delta <= MAX_MEAN_DELTA
    assert abs(total.perplexity_ratio - 1) <= MAX_PERPLEXITY_DEVIATION
