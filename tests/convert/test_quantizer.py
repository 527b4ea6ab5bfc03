"""The plain file: options reach llama.cpp, its log is understood, failures are sentences."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert.ftypes import FILE_TYPES, parse_file_type
from convert.gguf_file import GgufFile
from convert.imatrix_file import load_imatrix, write_imatrix
from convert.quantizer import (
    QuantizeError,
    QuantizeOptions,
    limits_of,
    parse_override,
    parse_tensor_type,
    quantize,
)
from quant_grids.errors import FormatError, QGuardError, UnsupportedError

Q4 = QuantizeOptions(parse_file_type("q4_k"), threads=2)


def types_of(path: Path) -> dict[str, str]:
    return {name: tensor.ggml_type.name for name, tensor in GgufFile(path).tensors.items()}


@pytest.mark.parametrize(("text", "name"), [("q4_k", "Q4_K_M"), ("Q4_K_M", "Q4_K_M"), ("Q3_k", "Q3_K_M"), ("7", "Q8_0")])
def test_names_as_in_llama_quantize(text: str, name: str) -> None:
    assert parse_file_type(text).name == name


def test_file_type_numbers_are_llama_cpps() -> None:
    import llama_cpp

    for file_type in FILE_TYPES:
        constant = "LLAMA_FTYPE_ALL_F32" if file_type.name == "F32" else f"LLAMA_FTYPE_MOSTLY_{file_type.name}"
        expected = getattr(llama_cpp, constant, None)
        if expected is not None:
            assert file_type.number == expected, file_type.name


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="did you mean Q6_K"):
        parse_file_type("q9_k")
    with pytest.raises(UnsupportedError, match="Q4_K_M"):
        parse_file_type("nothing like it")


def test_report_and_progress(tiny_base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = quantize(tiny_base, tmp_path / "q.gguf", Q4, progress=lambda i, n, name: seen.append((i, n, name)))
    types = types_of(tmp_path / "q.gguf")
    assert {t.name: t.target_type for t in report.tensors} == types
    assert seen[-1][0] == seen[-1][1] == len(types)
    assert not report.fallbacks
    assert set(types.values()) == {"F32", "Q4_K", "Q6_K"}


def test_dry_run_agrees_and_writes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    planned = quantize(tiny_base, out, Q4, dry_run=True)
    assert not out.exists()
    quantize(tiny_base, out, Q4)
    assert {t.name: t.target_type for t in planned.tensors} == types_of(out)


def test_options_have_llama_quantizes_meaning(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    options = replace(
        Q4,
        tensor_types=(parse_tensor_type("FFN_DOWN=q8_0"), parse_tensor_type(r"blk\.0\.attn_q=q5_k")),
        output_tensor_type="q8_0",
        token_embedding_type="q4_0",
        override_kv=("general.note=str:hello", "llama.context_length=int:77"),
    )
    quantize(tiny_base, out, options)
    types, file = types_of(out), GgufFile(out)
    assert types["blk.0.ffn_down.weight"] == types["blk.1.ffn_down.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "Q5_K"
    assert types["blk.1.attn_q.weight"] == "Q4_K"
    assert types["output.weight"] == "Q8_0"
    assert types["token_embd.weight"] == "Q4_0"
    assert file.value("general.note") == "hello"
    assert file.value("llama.context_length") == 77
    quantize(tiny_base, out, replace(Q4, pure=True, leave_output_tensor=True))
    assert types_of(out)["output.weight"] == "BF16"
    assert types_of(out)["blk.0.ffn_down.weight"] == "Q4_K"


@pytest.mark.parametrize("text", ["ffn_down", "=q4_0", "ffn_down=", "ffn_down=q99"])
def test_bad_tensor_type(text: str) -> None:
    with pytest.raises(UnsupportedError, match="--tensor-type"):
        parse_tensor_type(text)


def test_bad_pattern() -> None:
    with pytest.raises(UnsupportedError, match="regular expression"):
        replace(Q4, tensor_types=(("ffn_(", "q8_0"),)).check()


@pytest.mark.parametrize("text", ["a", "a=b", "a=int:x", "a=float:x", "a=bool:1", "a=str:" + "x" * 128, "=int:1"])
def test_bad_override(text: str) -> None:
    with pytest.raises(UnsupportedError, match="--override-kv"):
        parse_override(text)


def test_failure_quotes_llama_cpp_and_leaves_nothing(tmp_path: Path) -> None:
    broken, out = tmp_path / "broken.gguf", tmp_path / "q.gguf"
    broken.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64))
    with pytest.raises(QuantizeError, match=r"could not quantize broken.gguf"):
        quantize(broken, out, Q4)
    assert not out.exists()


def test_low_bit_type_without_imatrix_is_refused_by_llama_cpp(tiny_base: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(parse_file_type("iq2_xxs"))
    with pytest.raises(QuantizeError, match="imatrix"):
        quantize(tiny_base, tmp_path / "q.gguf", options)


def make_legacy(path: Path, entries: dict[str, np.ndarray], calls: int) -> None:
    raw = struct.pack("<i", len(entries))
    for name, values in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        raw += (values * calls).astype("<f4").tobytes()
    path.write_bytes(raw + struct.pack("<ii", 5, 8) + b"text.txt")


def weights_for(base: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = GgufFile(base).tensors.values()
    return {t.name: rng.lognormal(size=t.columns).astype(np.float32) for t in tensors if len(t.shape) == 2}


def test_both_imatrix_formats_mean_the_same(tiny_base: Path, tmp_path: Path) -> None:
    weights = weights_for(tiny_base)
    make_legacy(tmp_path / "old.dat", weights, calls=3)
    counts = {name: np.array([4.0], np.float32) for name in weights}
    sums = {name: values[None] * 4 for name, values in weights.items()}
    write_imatrix(tmp_path / "new.gguf", sums, counts, dataset="text.txt", chunks=5, chunk_size=512)
    old, new = load_imatrix(tmp_path / "old.dat"), load_imatrix(tmp_path / "new.gguf")
    assert old.entries.keys() == new.entries.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_allclose(old.entries[name], values, rtol=1e-6)
        np.testing.assert_allclose(new.entries[name], values, rtol=1e-6)
    assert (old.chunk_count, new.chunk_count, old.datasets, new.datasets) == (5, 5, ("text.txt",), ("text.txt",))


def test_imatrix_changes_the_file_and_is_recorded_without_a_path(tiny_base: Path, tmp_path: Path) -> None:
    make_legacy(tmp_path / "old.dat", weights_for(tiny_base), calls=1)
    quantize(tiny_base, tmp_path / "plain.gguf", Q4)
    quantize(tiny_base, tmp_path / "weighted.gguf", replace(Q4, imatrix=tmp_path / "old.dat"))
    plain, weighted = GgufFile(tmp_path / "plain.gguf"), GgufFile(tmp_path / "weighted.gguf")
    tensor = weighted.tensors["blk.0.ffn_up.weight"]
    assert plain.raw(tensor.offset, tensor.offset + 1000) != weighted.raw(tensor.offset, tensor.offset + 1000)
    assert weighted.value("quantize.imatrix.file") == "old.dat"
    assert weighted.value("quantize.imatrix.entries_count") == len(weights_for(tiny_base))


@pytest.mark.parametrize("raw", [b"", b"\x01\0\0\0", struct.pack("<ii", 1, 1 << 30), struct.pack("<ii", 1, -5)])
def test_broken_imatrix(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(raw)
    with pytest.raises(QGuardError):
        load_imatrix(path)


def test_imatrix_with_nan_is_refused(tmp_path: Path) -> None:
    make_legacy(tmp_path / "nan.dat", {"a": np.array([1.0, np.nan], np.float32)}, calls=1)
    with pytest.raises(FormatError, match="not finite"):
        load_imatrix(tmp_path / "nan.dat")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("QGUARD_LLAMA_SECONDS", "0.05", "without a sign of life"), ("QGUARD_LLAMA_GIB", "0.01", "could not quantize")],
)
def test_the_child_is_limited(
    variable: str, value: str, said: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("convert.child.TICK", 0.02)  # the file is small: made before a second is counted
    with pytest.raises(QuantizeError, match=said):
        quantize(tiny_base, tmp_path / "o.gguf", Q4)
    assert list(tmp_path.iterdir()) == []


def test_limits_grow_with_the_largest_tensor(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = limits_of(tiny_base, 1)
    monkeypatch.setattr("convert.gguf_file.TensorInfo.n_weights", 1 << 30)
    large = limits_of(tiny_base, 1)
    assert usual.memory is not None
    assert large.memory is not None
    assert large.memory > usual.memory
    assert large.seconds > usual.seconds + 3600
