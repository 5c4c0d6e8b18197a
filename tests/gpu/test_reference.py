"""The GPU against Hugging Face transformers on a real model, teacher-forced (golden/make_reference.py)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tokenwire import _native

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parent.parent / "golden"
MIN_TOP1_AGREEMENT = 0.99
MAX_MEAN_DELTA = 0.02
MAX_PERPLEXITY_DEVIATION = 0.005


def model_path() -> Path:
    """The model's file: what TOKENWIRE_SMOLLM2 names, else the one in the model store."""
    named = os.environ.get("TOKENWIRE_SMOLLM2")
    if named:
        return Path(named)
    from tokenwire import models

    return models.resolve("smollm2")


def test_logits_agree_with_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    texts: dict[str, dict[str, npt.NDArray[np.generic]]] = {}
    with np.load(GOLDEN / "reference_logits.npz", allow_pickle=False) as archive:
        for key in archive.files:
            name, _, kind = key.partition(".")
            texts.setdefault(name, {})[kind] = archive[key]
    options = _native.EngineOptions()
    options.device = "cuda"
    runner = _native.Runner(_native.GgufFile(str(model_path())), options)
    positions, same, deltas, nll, reference_nll = 0, 0, [], 0.0, 0.0
    for golden in texts.values():
        runner.reset()
        ids = golden["ids"].astype(np.int64)
        data = runner.forward(0, ids.tolist(), all_logits=True)
        logits = np.frombuffer(data, np.float32).reshape(len(ids), -1)[:-1].astype(np.float64)
        assert np.isfinite(logits).all()
        logits -= logits.max(axis=1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        positions += len(logp)
        same += int((logp.argmax(axis=1) == golden["top1"]).sum())
        nll -= float(logp[np.arange(len(logp)), ids[1:]].sum())
        reference_nll += float(golden["nll"].astype(np.float64))
        kept = logp[golden["pos"].astype(np.int64)]
        found = np.take_along_axis(kept, golden["top_ids"].astype(np.int64), axis=1)
        deltas.append(np.abs(found - golden["top_logp"].astype(np.float64)).ravel())
    delta = float(np.concatenate(deltas).mean())
    perplexity = float(np.exp((nll - reference_nll) / positions))
    with capsys.disabled():
        print(  # noqa: T201  (the figures are the point of this test)
            f"\n{positions} positions  top-1 {same / positions:.4f}  mean |delta log p| {delta:.4f}  "
            f"perplexity ratio {perplexity:.4f}"
        )
    assert same / positions >= MIN_TOP1_AGREEMENT
    assert delta <= MAX_MEAN_DELTA
    assert abs(perplexity - 1) <= MAX_PERPLEXITY_DEVIATION
