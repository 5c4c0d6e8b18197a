"""Each architecture against Hugging Face transformers on tiny random models, in float32 (golden/make_tiny.py).

The model files are built again from their seeds; transformers was given the values that the files' bytes stand for.
What remains between the two is the engine's FP16 cache, its 16-bit activation codes where weights are quantised, and
rounding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from golden.tiny_cases import CASES, KEPT_POSITIONS, TinyCase
from tokenwire._native import EngineOptions, GgufFile, Runner

ARCHIVE = Path(__file__).parent.parent / "golden" / "tiny_logits.npz"

# Of the largest logit's size. A wrong pairing of rotated dimensions, a missing bias or another rope base move logits by
# more than a tenth of it.
MAX_DEVIATION = 1e-3

Floats = npt.NDArray[np.float32]


def open_runner(path: Path, num_threads: int = 1) -> Runner:
    options = EngineOptions()
    options.num_threads = num_threads
    options.kv_cache_bytes = 4 << 20
    return Runner(GgufFile(str(path)), options)


def logits_of(runner: Runner, ids: list[int], chunks: list[int]) -> Floats:
    """Logits `[len(ids), vocab_size]` of one sequence fed in chunks that end at these positions."""
    runner.reset()
    parts = []
    for begin, end in zip([0, *chunks], [*chunks, len(ids)], strict=True):
        parts.append(np.frombuffer(runner.forward(0, ids[begin:end], all_logits=True), np.float32))
    return np.concatenate(parts).reshape(len(ids), -1)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_tiny_model_agrees_with_transformers(tmp_path: Path, case: TinyCase) -> None:
    tiny = case.build(tmp_path / "model.gguf")
    with np.load(ARCHIVE) as archive:
        expected: Floats = archive[f"{case.name}.logits"]
        checksum = float(archive[f"{case.name}.checksum"])
    total = sum(float(np.abs(values.astype(np.float64)).sum()) for values in tiny.weights.values())
    assert total == pytest.approx(checksum, rel=1e-9), "other weights than make_tiny.py saw: run it again"

    ids = case.token_ids(tiny.vocab_size)
    runner = open_runner(tiny.path)
    logits = logits_of(runner, ids, [])
    deviation = np.abs(logits[list(KEPT_POSITIONS)] - expected).max() / np.abs(expected).max()
    assert deviation < MAX_DEVIATION

    for num_threads in (1, 2):
        chunked = logits_of(open_runner(tiny.path, num_threads), ids, [1, 2, 40, 257, 279])
        assert chunked.tobytes() == logits.tobytes()


def test_deviation_from_another_model_is_far_beyond_the_bound(tmp_path: Path) -> None:
    cases = {case.name: case for case in CASES}
    wrong = [
        (cases["qwen2-tied-f32"], {"rope_base": 1e4}),
        (cases["qwen2-tied-f32"], {"rms_eps": 1e-2}),
        (cases["llama-tied-f32"], {"rope_base": 1e5}),
        (cases["llama-stretched-rope-f32"], {"rope_factors": ()}),
    ]
    with np.load(ARCHIVE) as archive:
        for case, change in wrong:
            expected: Floats = archive[f"{case.name}.logits"]
            tiny = TinyCase(case.name, {**case.model, **change}).build(tmp_path / "model.gguf")
            logits = logits_of(open_runner(tiny.path), case.token_ids(tiny.vocab_size), [])[list(KEPT_POSITIONS)]
            assert np.abs(logits - expected).max() / np.abs(expected).max() > 10 * MAX_DEVIATION
