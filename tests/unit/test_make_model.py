"""The benchmarks' model maker: its files are valid, load, tokenise any text, and are the same for the same seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tokenwire._native import EngineOptions, GgufFile, Runner
from tokenwire.text import load_text
from unit.gguf_formats import FORMATS, dequantize

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The tokenizer takes any text: naïve, 東京, 🙂 and\ttabs."


def make(path: Path, mix: str, seed: int = 0) -> GgufFile:
    command = [sys.executable, "-m", "benchmarks.make_model", "tiny", mix, str(path), "--seed", str(seed)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return GgufFile(str(path))


@pytest.mark.parametrize(
    ("mix", "formats"),
    [
        ("f16", {"F32", "F16"}),
        ("bf16", {"F32", "BF16"}),
        ("q8_0", {"F32", "Q8_0"}),
        ("q4_0", {"F32", "Q4_0", "Q8_0"}),
        ("q4_k_m", {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}),
    ],
)
def test_made_model_has_the_formats_of_its_mix_and_runs(tmp_path: Path, mix: str, formats: set[str]) -> None:
    file = make(tmp_path / "model.gguf", mix)
    assert {tensor.type for tensor in file.tensors()} == formats
    options = EngineOptions()
    options.num_threads = 1
    options.kv_cache_bytes = 1 << 20
    runner = Runner(file, options)
    text = load_text(file, tmp_path / "model.gguf")
    ids = text.encode_prompt(TEXT)
    vocabulary = text.vocabulary()
    assert b"".join(vocabulary[i] for i in ids).decode() == TEXT
    logits = np.frombuffer(runner.forward(0, ids), np.float32)
    assert logits.shape == (1024,)
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 5


def test_made_weights_have_the_deviation_of_a_normalised_matrix(tmp_path: Path) -> None:
    for mix in ("bf16", "q8_0", "q4_0", "q4_k_m"):
        path = tmp_path / "model.gguf"
        file = make(path, mix)
        end = file.num_bytes
        for tensor in reversed(file.tensors()):
            data = path.read_bytes()[end - -(-tensor.num_bytes // 32) * 32 :][: tensor.num_bytes]
            end -= -(-tensor.num_bytes // 32) * 32
            if len(tensor.shape) == 2:
                values = dequantize(tensor.type, data, tensor.shape[::-1])
                assert values.std() * np.sqrt(tensor.shape[0]) == pytest.approx(1, rel=0.1), tensor.name
                assert abs(values.mean()) < 0.05 * values.std(), tensor.name


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make(tmp_path / name, "q4_k_m", seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_formats_agree_with_the_builder_of_the_tests() -> None:
    program = (
        "import json; from benchmarks.random_blocks import FORMATS; "
        "print(json.dumps({name: [f.number, f.block_values, f.block_bytes] for name, f in FORMATS.items()}))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=60)
    found = json.loads(result.stdout)
    expected = {name: [row.number, row.block_values, row.block_bytes] for name, row in FORMATS.items()}
    assert found == {name: expected[name] for name in found}
