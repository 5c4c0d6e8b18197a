"""Malformed and hostile model files: each is refused with one clear line, at once and without memory growth (W-40)."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import time
from pathlib import Path

import pytest

from tokenwire._native import EngineError, GgufFile
from unit import gguf_builder as g
from unit.gguf_formats import FORMATS

MALFORMED = "MODEL_LOAD_FAILED"
UNSUPPORTED = "UNSUPPORTED_MODEL"
F32 = FORMATS["F32"].number
Q4_0 = FORMATS["Q4_0"].number

MAX_REFUSAL_MS = 50
MAX_GROWTH_BYTES = 1 << 20


def refuse(path: Path | str) -> EngineError:
    """Opens a file that must be refused, and checks the form of the answer."""
    with pytest.raises(EngineError) as caught:
        GgufFile(str(path))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert message.startswith(str(path))
    return caught.value


def tensor(
    dims: tuple[int, ...] = (8,), number: int = F32, offset: int = 0, data: bytes = bytes(32), n_dims: int | None = None
) -> bytes:
    return g.gguf([], [g.tensor_info("w", dims, number, offset, n_dims)], data)


def two_tensors(first: int, second: int, names: tuple[str, str] = ("a", "b")) -> bytes:
    infos = [g.tensor_info(name, (16,), F32, at) for name, at in zip(names, (first, second), strict=True)]
    return g.gguf([], infos, bytes(128))


def nested(depth: int) -> bytes:
    return g.gguf([g.kv_raw("x", g.ARRAY, (g.u32(g.ARRAY) + g.u64(1)) * depth + g.u32(g.UINT8) + g.u64(0))])


def alignment(value_type: int, value: float | str) -> bytes:
    return g.gguf([g.kv("general.alignment", value_type, value)], [g.tensor_info("w", (8,), F32, 0)], bytes(64))


ONE = g.kv("k", g.UINT32, 1)
W = g.tensor_info("w", (8,), F32, 0)

CASES = [
    ("G1-empty", b"", MALFORMED, "the file is empty"),
    ("G1-one-byte", b"G", MALFORMED, "ends inside the header"),
    ("G1-magic-only", b"GGUF", MALFORMED, "ends inside the header"),
    ("G1-23-bytes", g.header(0, 0)[:23], MALFORMED, "ends inside the header"),
    ("G2-other-magic", g.gguf(magic=b"FUGG"), MALFORMED, "not a GGUF file: it begins with `FUGG` (offset 0)"),
    ("G2-zip", b"PK\x03\x04" + bytes(100), MALFORMED, r"begins with `PK\x03\x04`"),
    ("G2-safetensors", struct.pack("<Q", 64) + b'{"a":{}}' + bytes(64), MALFORMED, "not a GGUF file"),
    ("G3-version-0", g.gguf(version=0), UNSUPPORTED, "GGUF version 0 is not supported, only version 3 (offset 4)"),
    ("G3-version-1", g.gguf(version=1), UNSUPPORTED, "GGUF version 1 is not supported"),
    ("G3-version-2", g.gguf(version=2), UNSUPPORTED, "GGUF version 2 is not supported"),
    ("G3-version-4", g.gguf(version=4), UNSUPPORTED, "GGUF version 4 is not supported"),
    ("G3-version-max", g.gguf(version=2**32 - 1), UNSUPPORTED, "GGUF version 4294967295"),
    ("G4-big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UNSUPPORTED, "big-endian GGUF files are not supported"),
    ("G5-tensors-2^64-1", g.gguf(n_tensors=2**64 - 1), MALFORMED, "tensors, more than the limit of 65536 (offset 8)"),
    ("G5-tensors-2^63", g.gguf(n_tensors=2**63), MALFORMED, "more than the limit"),
    ("G5-keys-2^64-1", g.gguf(n_kv=2**64 - 1), MALFORMED, "keys, more than the limit of 65536 (offset 16)"),
    ("G5-keys-2^63", g.gguf(n_kv=2**63), MALFORMED, "more than the limit"),
    ("G5-keys-beyond-file", g.gguf([ONE], n_kv=65536), MALFORMED, "65536 keys but is too short for them"),
    ("G5-tensors-beyond-file", g.gguf([ONE], n_tensors=65536), MALFORMED, "65536 tensors but is too short for them"),
    ("G5-one-key-too-many", g.gguf([ONE, ONE[:-4] + bytes(4)], n_kv=3), MALFORMED, "keys but is too short"),
    (
        "G5-one-key-too-few",
        g.gguf([ONE, g.kv("j", g.UINT32, 1)], n_kv=1, n_tensors=1),
        MALFORMED,
        "inside the tensors' desc",
    ),
    ("G5-one-tensor-too-many", g.gguf([], [W], bytes(64), n_tensors=2), MALFORMED, "a tensor's name is empty"),
    ("G6-key-length-2^63", g.header(0, 1) + g.u64(2**63) + bytes(11), MALFORMED, "a key has 9223372036854775808 bytes"),
    ("G6-key-empty", g.gguf([g.kv("", g.UINT32, 1)]), MALFORMED, "a key is empty (offset 24)"),
    ("G6-key-65536", g.gguf([g.kv("k" * 65536, g.UINT32, 1)]), MALFORMED, "more than the limit of 65535"),
    ("G6-key-not-ascii", g.gguf([g.kv("schlüssel", g.UINT32, 1)]), MALFORMED, "is not printable ASCII"),
    ("G6-key-newline", g.gguf([g.kv("a\nb", g.UINT32, 1)]), MALFORMED, r"`a\x0ab` is not printable ASCII"),
    ("G6-string-2^64-1", g.gguf([g.kv_raw("k", g.STRING, g.u64(2**64 - 1))]), MALFORMED, "more than the limit"),
    ("G6-string-beyond", g.gguf([g.kv_raw("k", g.STRING, g.u64(2**23))]), MALFORMED, "ends inside a string value"),
    ("G7-value-type-13", g.gguf([g.kv_raw("k", 13, bytes(8))]), MALFORMED, "unknown value type 13"),
    ("G7-value-type-255", g.gguf([g.kv_raw("k", 255, bytes(8))]), MALFORMED, "unknown value type 255"),
    ("G7-element-type-13", g.gguf([g.kv_raw("k", g.ARRAY, g.u32(13) + g.u64(0))]), MALFORMED, "unknown value type 13"),
    ("G7-bool-2", g.gguf([g.kv("k", g.BOOL, 2)]), MALFORMED, "a bool that is neither 0 nor 1"),
    ("G7-bool-array", g.gguf([g.kv_array("k", g.BOOL, [0, 1, 2])]), MALFORMED, "a bool that is neither 0 nor 1"),
    ("G8-nested-1", nested(1), MALFORMED, "`x` is an array of arrays"),
    ("G8-nested-1000", nested(1000), MALFORMED, "`x` is an array of arrays"),
    ("G8-array-2^62", g.gguf([g.kv_array("k", g.UINT8, [], 2**62)]), MALFORMED, "more than the limit of 16777216"),
    ("G8-array-wrap", g.gguf([g.kv_array("k", g.UINT64, [], 2**61)]), MALFORMED, "more than the limit of 16777216"),
    ("G8-array-16Mi", g.gguf([g.kv_array("k", g.STRING, [], 2**24)]), MALFORMED, "too short for them"),
    ("G9-key-twice", g.gguf([ONE, g.kv("j", g.UINT8, 1), ONE]), MALFORMED, "key `k` is there twice"),
    ("G9-tensor-twice", two_tensors(0, 64, ("w", "w")), MALFORMED, "tensor `w` is there twice"),
    ("G10-alignment-0", alignment(g.UINT32, 0), MALFORMED, "is 0, not a power of two from 1 to 1048576"),
    ("G10-alignment-3", alignment(g.UINT32, 3), MALFORMED, "is 3, not a power of two"),
    ("G10-alignment-13", alignment(g.UINT32, 13), MALFORMED, "is 13, not a power of two"),
    ("G10-alignment-2^21", alignment(g.UINT32, 2**21), MALFORMED, "not a power of two from 1 to 1048576"),
    ("G10-alignment-2^31", alignment(g.UINT32, 2**31), MALFORMED, "not a power of two from 1 to 1048576"),
    ("G10-alignment-int32", alignment(g.INT32, 32), MALFORMED, "has type int32, uint32 expected"),
    ("G10-alignment-uint64", alignment(g.UINT64, 32), MALFORMED, "has type uint64, uint32 expected"),
    ("G10-alignment-string", alignment(g.STRING, "32"), MALFORMED, "has type string, uint32 expected"),
    ("G11-n-dims-0", tensor((), n_dims=0), MALFORMED, "tensor `w` has 0 dimensions, not 1 to 4"),
    ("G11-n-dims-5", tensor((1,) * 5), MALFORMED, "tensor `w` has 5 dimensions, not 1 to 4"),
    ("G11-n-dims-2^31", tensor((1,), n_dims=2**31), MALFORMED, "2147483648 dimensions"),
    ("G12-dim-0", tensor((8, 0)), MALFORMED, "dimension 0, which is empty"),
    ("G12-dim-negative", tensor((2**64 - 8,)), MALFORMED, "which is too large"),
    ("G12-dim-2^62", tensor((2**62,)), MALFORMED, "tensor `w` is too large"),
    ("G12-dim-2^42+1", tensor((2**42 + 1, 2**22)), MALFORMED, "which is too large"),
    ("G12-dim-2^63-64", tensor((2**63 - 64,)), MALFORMED, "tensor `w` is too large"),
    ("G12-product-wraps-to-8", tensor((2**61 + 1, 8)), MALFORMED, "which is too large"),
    ("G12-product-wraps-to-0", tensor((2**32, 2**32)), MALFORMED, "which is too large"),
    ("G12-row-not-a-block", tensor((33, 32), Q4_0), MALFORMED, "rows of 33 values, not a multiple of the 32"),
    *((f"G13-type-{n}", tensor((32,), n), UNSUPPORTED, f"unsupported type {n} (") for n in (4, 5, 31, 32, 33)),
    ("G13-type-iq4-xs", tensor((256,), 23), UNSUPPORTED, "unsupported type 23 (IQ4_XS)"),
    ("G13-type-41", tensor((32,), 41), UNSUPPORTED, "unsupported unknown type 41"),
    ("G13-type-max", tensor((32,), 2**32 - 1), UNSUPPORTED, "unknown type 4294967295"),
    ("G14-unaligned", tensor(offset=4, data=bytes(64)), MALFORMED, "begins at 4, not a multiple of the alignment 32"),
    ("G14-past-end", tensor(offset=2**40), MALFORMED, "tensor `w` ends beyond the file"),
    ("G14-offset-wrap", tensor(offset=2**64 - 32), MALFORMED, "tensor `w` ends beyond the file"),
    ("G14-overlapping", two_tensors(0, 32), MALFORMED, "tensor `b` begins before the end of the tensor before it"),
    ("G14-same-place", two_tensors(0, 0), MALFORMED, "tensor `b` begins before the end"),
    ("G14-descending", two_tensors(64, 0), MALFORMED, "tensor `b` begins before the end"),
    ("G14-name-65-bytes", g.gguf([], [g.tensor_info("w" * 65, (8,), F32, 0)], bytes(32)), MALFORMED, "limit of 64"),
    ("G14-name-empty", g.gguf([], [g.tensor_info("", (8,), F32, 0)], bytes(32)), MALFORMED, "name is empty"),
    ("G14-name-not-ascii", g.gguf([], [g.tensor_info(b"\xff", (8,), F32, 0)], bytes(32)), MALFORMED, r"`\xff` is not"),
    ("G15-short-by-one", tensor(data=bytes(31)), MALFORMED, "tensor `w` ends beyond the file (offset 64)"),
    ("G15-no-data", tensor(data=b""), MALFORMED, "tensor `w` ends beyond the file"),
    ("G24-split", g.gguf([g.kv("split.count", g.UINT16, 3)]), UNSUPPORTED, "one of 3 parts of a split model"),
    ("G24-split-type", g.gguf([g.kv("split.count", g.STRING, "3")]), MALFORMED, "has type string, uint16 expected"),
]


def memory(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is resident now, VmHWM the most since the peak was last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("data", "code", "part"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_malformed_file_is_refused_at_once_with_one_line(tmp_path: Path, data: bytes, code: str, part: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"warms what the first error of a process loads")
    refuse(path)
    path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    begin = time.perf_counter()
    error = refuse(path)
    elapsed_ms = (time.perf_counter() - begin) * 1000
    growth = memory("VmHWM") - before
    assert error.code == code
    assert part in str(error)
    assert elapsed_ms < MAX_REFUSAL_MS
    assert growth < MAX_GROWTH_BYTES


ACCEPTED = [
    ("G10-alignment-1", alignment(g.UINT32, 1), 0),
    ("G10-alignment-8", g.gguf([g.kv("general.alignment", g.UINT32, 8)], alignment=8), 0),
    ("G10-alignment-2^20", g.gguf([g.kv("general.alignment", g.UINT32, 2**20)], alignment=2**20), 0),
    ("G16-trailing-junk", tensor() + bytes(1000), 1),
    ("G22-all-zero-tensor", tensor((32, 8), Q4_0, data=bytes(8 * 18)), 1),
    ("G24-one-part", g.gguf([g.kv("split.count", g.UINT16, 1)]), 0),
    ("no-keys-no-tensors", g.header(0, 0), 0),
    ("gap-between-tensors", two_tensors(0, 64), 2),
]


@pytest.mark.parametrize(("data", "num_tensors"), [pytest.param(*case[1:], id=case[0]) for case in ACCEPTED])
def test_unusual_but_valid_file_opens(tmp_path: Path, data: bytes, num_tensors: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert GgufFile(str(path)).num_bytes == len(data)
    if num_tensors:
        assert len(GgufFile(str(path)).tensors()) == num_tensors


def test_g1_file_truncated_at_every_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = g.tiny_llama(path).path.read_bytes()
    assert len(whole) > 8192
    for size in range(4096, -1, -1):
        os.truncate(path, size)
        assert refuse(path).code == MALFORMED


def test_g1_file_truncated_at_every_section_edge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = g.tiny_llama(path).path.read_bytes()
    num_data_bytes = sum(-(-tensor.num_bytes // 32) * 32 for tensor in GgufFile(str(path)).tensors())
    data_offset = len(whole) - num_data_bytes
    first_tensor = whole.index(g.string("token_embd.weight"))
    edges = {4, 8, 16, 24, first_tensor, data_offset, len(whole)}
    for size in sorted({edge + step for edge in edges for step in (-1, 0, 1)} - {len(whole), len(whole) + 1}):
        path.write_bytes(whole[:size])
        assert refuse(path).code == MALFORMED


def test_g25_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    os.mkfifo(path)
    assert "this is a FIFO, not a model file" in str(refuse(path))


def test_g25_socket_device_directory_and_missing_file_are_named(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "this is a socket" in str(refuse(tmp_path / "socket"))
    assert "this is a device" in str(refuse("/dev/zero"))
    assert "this is a directory" in str(refuse(tmp_path))
    assert "No such file or directory" in str(refuse(tmp_path / "absent"))
    assert "Not a directory" in str(refuse("/dev/null/model.gguf"))


def test_g25_symlinks_are_followed_and_loops_are_named(tmp_path: Path) -> None:
    g.tiny_llama(tmp_path / "model.gguf")
    (tmp_path / "link").symlink_to("model.gguf")
    assert len(GgufFile(str(tmp_path / "link")).tensors()) > 0
    (tmp_path / "loop").symlink_to("loop")
    assert "Too many levels of symbolic links" in str(refuse(tmp_path / "loop"))


def test_g25_file_without_permission_is_named() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner may enter
        Path(folder).chmod(0o755)
        path = Path(folder, "model.gguf")
        g.tiny_llama(path)
        path.chmod(0)
        if user == 0:  # the superuser may read everything
            os.seteuid(65534)
        try:
            error = refuse(path)
        finally:
            os.seteuid(user)
    assert error.code == MALFORMED
    assert "Permission denied" in str(error)


def test_path_that_is_not_text_appears_escaped(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xffel\n.gguf")
    Path(path).write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"mod\\xffel\\x0a\.gguf: not a GGUF file"):
        GgufFile(path)
    g.tiny_llama(Path(path))
    assert GgufFile(path).path == path
    with pytest.raises(EngineError, match="contains a NUL character"):
        GgufFile("model\0.gguf")


def test_g26_file_shortened_after_opening_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    g.tiny_llama(path)
    file = GgufFile(str(path))
    assert file.get_bytes("tokenizer.ggml.merges")
    os.truncate(path, 100)
    for read in (lambda: file.get_bytes("tokenizer.ggml.merges"), lambda: file.get("tokenizer.chat_template")):
        with pytest.raises(EngineError, match="the file changed, or could not be read") as caught:
            read()
        assert caught.value.code == MALFORMED
