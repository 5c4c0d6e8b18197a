"""Well-formed files that are no usable model: wrong configuration, missing or misshapen tensors, NaN scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tokenwire._native import EngineError, EngineOptions, GgufFile, Runner
from unit import gguf_builder as g
from unit.gguf_formats import FORMATS

MALFORMED = "MODEL_LOAD_FAILED"
UNSUPPORTED = "UNSUPPORTED_MODEL"


def load(path: Path) -> Runner:
    options = EngineOptions()
    options.num_threads = 1
    options.kv_cache_bytes = 1 << 20
    return Runner(GgufFile(str(path)), options)


def refuse(path: Path) -> EngineError:
    with pytest.raises(EngineError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.code in (MALFORMED, UNSUPPORTED)
    return caught.value


def u32(name: str, value: int) -> bytes:
    return g.kv(f"llama.{name}", g.UINT32, value)


def f32(name: str, value: float) -> bytes:
    return g.kv(f"llama.{name}", g.FLOAT32, value)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_model_of_every_format_loads(tmp_path: Path, dtype: str, tied: bool) -> None:
    width = max(64, FORMATS[dtype].block_values)
    model = g.tiny_llama(tmp_path / "model.gguf", dtype=dtype, tied=tied, n_embd=width, n_ff=2 * width)
    runner = load(model.path)
    assert runner.model_info.vocab_size == model.vocab_size
    logits = np.frombuffer(runner.forward(0, [1, 2, 3]), np.float32)
    assert logits.shape == (model.vocab_size,)
    assert np.isfinite(logits).all()


MISSING = ["general.architecture", *(f"llama.{name}" for name in ("block_count", "context_length", "embedding_length"))]
MISSING += ["llama.feed_forward_length", "llama.attention.head_count"]


@pytest.mark.parametrize("key", [pytest.param(key, id=f"G17-{key}") for key in MISSING])
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    g.tiny_llama(tmp_path / "model.gguf", drop_keys=[key])
    error = refuse(tmp_path / "model.gguf")
    assert error.code == MALFORMED
    assert f"key `{key}` is missing" in str(error)


def test_g17_unknown_architecture_is_named(tmp_path: Path) -> None:
    keys = [g.kv("general.architecture", g.STRING, "mystery")]
    g.tiny_llama(tmp_path / "model.gguf", extra_keys=keys)
    error = refuse(tmp_path / "model.gguf")
    assert error.code == UNSUPPORTED
    assert "`mystery`" in str(error)


CONFIGURATIONS = [
    ("block-count-0", u32("block_count", 0)),
    ("block-count-2^31", u32("block_count", 2**31)),
    ("head-count-0", u32("attention.head_count", 0)),
    ("head-count-not-a-multiple", u32("attention.head_count_kv", 3)),
    ("kv-heads-0", u32("attention.head_count_kv", 0)),
    ("head-dim-0", u32("attention.key_length", 0)),
    ("embedding-not-split-evenly", u32("attention.head_count", 6)),
    ("embedding-0", u32("embedding_length", 0)),
    ("embedding-2^31", u32("embedding_length", 2**31)),
    ("ffn-0", u32("feed_forward_length", 0)),
    ("rope-dims-0", u32("rope.dimension_count", 0)),
    ("rope-dims-odd", u32("rope.dimension_count", 7)),
    ("rope-dims-beyond-head", u32("rope.dimension_count", 1024)),
    ("rope-base-0", f32("rope.freq_base", 0.0)),
    ("rope-base-nan", f32("rope.freq_base", float("nan"))),
    ("rope-base-negative", f32("rope.freq_base", -1e4)),
    ("eps-0", f32("attention.layer_norm_rms_epsilon", 0.0)),
    ("eps-nan", f32("attention.layer_norm_rms_epsilon", float("nan"))),
    ("eps-infinite", f32("attention.layer_norm_rms_epsilon", float("inf"))),
    ("eps-negative", f32("attention.layer_norm_rms_epsilon", -1e-5)),
    ("context-0", u32("context_length", 0)),
    ("context-2^31", u32("context_length", 2**31)),
]


@pytest.mark.parametrize("key", [pytest.param(case[1], id=f"G18-{case[0]}") for case in CONFIGURATIONS])
def test_absurd_configuration_is_refused(tmp_path: Path, key: bytes) -> None:
    g.tiny_llama(tmp_path / "model.gguf", extra_keys=[key])
    refuse(tmp_path / "model.gguf")


KEYS = {
    "general.architecture": g.STRING,
    "llama.block_count": g.UINT32,
    "llama.context_length": g.UINT32,
    "llama.embedding_length": g.UINT32,
    "llama.feed_forward_length": g.UINT32,
    "llama.attention.head_count": g.UINT32,
    "llama.attention.head_count_kv": g.UINT32,
    "llama.attention.layer_norm_rms_epsilon": g.FLOAT32,
    "llama.rope.dimension_count": g.UINT32,
    "llama.rope.freq_base": g.FLOAT32,
}


@pytest.mark.parametrize("key", KEYS)
def test_value_of_any_other_type_is_refused_and_named(tmp_path: Path, key: str) -> None:
    for value_type in range(13):
        if value_type == KEYS[key]:
            continue
        value: bytes = g.u32(g.UINT32) + g.u64(0) if value_type == g.ARRAY else b""
        entry = g.kv_raw(key, g.ARRAY, value) if value else g.kv(key, value_type, "x" if value_type == g.STRING else 1)
        g.tiny_llama(tmp_path / "model.gguf", extra_keys=[entry])
        error = refuse(tmp_path / "model.gguf")
        assert error.code == MALFORMED
        assert f"key `{key}` has type" in str(error)


TENSORS = ["token_embd", "output_norm"]
TENSORS += [f"blk.1.{name}" for name in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")]
TENSORS += [f"blk.1.{name}" for name in ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")]


@pytest.mark.parametrize("name", [pytest.param(f"{name}.weight", id=f"G19-{name}") for name in TENSORS])
def test_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    g.tiny_llama(tmp_path / "model.gguf", drop_tensors=[name])
    error = refuse(tmp_path / "model.gguf")
    assert error.code == MALFORMED
    assert f"tensor `{name}` is missing" in str(error)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_g19_other_number_of_layers_than_tensors_is_refused(tmp_path: Path, num_layers: int) -> None:
    g.tiny_llama(tmp_path / "model.gguf", n_layers=2, extra_keys=[u32("block_count", num_layers)])
    assert "blk." in str(refuse(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "key", ["embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"]
)
def test_g19_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path: Path, key: str) -> None:
    value = {"embedding_length": 128, "feed_forward_length": 256, "attention.head_count": 8}.get(key, 4)
    keys = [u32(key, value), u32("attention.key_length", 16), u32("attention.value_length", 16)]
    g.tiny_llama(tmp_path / "model.gguf", extra_keys=keys)
    error = refuse(tmp_path / "model.gguf")
    assert "has shape [" in str(error)
    assert "] expected" in str(error)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_down.weight", "output_norm.weight"])
def test_g21_scale_that_is_not_finite_is_refused(tmp_path: Path, dtype: str, name: str) -> None:
    path = tmp_path / "model.gguf"
    g.tiny_llama(path, dtype=dtype)
    data = bytearray(path.read_bytes())
    end = len(data)
    for tensor in reversed(GgufFile(str(path)).tensors()):
        begin = end - -(-tensor.num_bytes // 32) * 32
        if tensor.name == name:
            width = 4 if tensor.type == "F32" else 2
            data[begin : begin + width] = b"\xff" * width  # NaN in F32, F16 and BF16
        end = begin
    path.write_bytes(data)
    error = refuse(path)
    assert error.code == MALFORMED
    assert f"`{name}`" in str(error)
    assert "finite" in str(error)


def test_g22_model_of_zeros_loads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    g.tiny_llama(path)
    data = path.read_bytes()
    num_data_bytes = sum(-(-tensor.num_bytes // 32) * 32 for tensor in GgufFile(str(path)).tensors())
    path.write_bytes(data[:-num_data_bytes] + bytes(num_data_bytes))
    assert set(load(path).forward(0, [1])) == {0}
