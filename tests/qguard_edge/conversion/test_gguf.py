"""The main job on the tiny model, whose widths of 256 make real k-quant blocks: only code bits change, and by the seed alone."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from convert.atomic import OutputError
from convert.diff import compare_files, qguard_metadata
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from convert.missing import SourceError
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.activations import activations_folder
from qguard_edge.conversion.report import GgufReport
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions, NoneOptions, OrthoOptions
from qguard_edge.runtimes.load_check import LoadCheckError, load_check
from quant_grids.errors import QGuardError, UnsupportedError
from tests.helpers.expected_targets import ortho_target
from tests.helpers.gguf_copies import copy_gguf

TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"]


def request(model: Path, out: Path, to: str = "q4_k", defense: DefenseOptions | None = None) -> GgufRequest:
    return GgufRequest(
        model=str(model),
        options=QuantizeOptions(parse_file_type(to), threads=2),
        defense=defense or OrthoOptions(),
        outfile=str(out),
        device="cpu",
    )


def plain(base: Path, out: Path, to: str) -> Path:
    quantize(base, out, QuantizeOptions(parse_file_type(to), threads=2))
    return out


def convert(what: GgufRequest) -> GgufReport:
    """Without the load check, which has a test of its own."""
    return convert_model(replace(what, check_loads=False))


def test_a_matrix_of_one_row_loses_that_one_in_llama_cpps_file(tiny_base: Path, tmp_path: Path) -> None:
    gate = np.ones((1, 256), np.float32)
    [base] = copy_gguf(tiny_base, tmp_path / "base.gguf", more={"blk.0.ffn_gate_inp_shexp.weight": gate})
    made = convert(request(base, tmp_path / "out.gguf"))
    assert GgufFile(base).tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (256, 1)
    assert GgufFile(made.outfile).tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (256,)
    assert compare_files(plain(base, tmp_path / "plain.gguf", "q4_k"), made.outfile, base=base).only_code_bits


@pytest.mark.parametrize("to", TYPES)
def test_no_defense_is_llama_cpps_own_file(tiny_base: Path, tmp_path: Path, to: str) -> None:
    plain_file = plain(tiny_base, tmp_path / "plain.gguf", to)
    report = convert(request(tiny_base, tmp_path / "out.gguf", to, NoneOptions()))
    found = compare_files(plain_file, report.outfile)
    assert found.codes_changed == 0
    assert found.only_code_bits
    theirs, ours = GGUFReader(plain_file), GGUFReader(report.outfile)  # a reader that is not ours
    for a, b in zip(theirs.tensors, ours.tensors, strict=True):
        assert (a.name, a.data.tobytes()) == (b.name, b.data.tobytes())
    kept = {key for key in ours.fields if not key.startswith(("qguard.", "GGUF."))}
    assert kept == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key in kept:
        assert ours.fields[key].contents() == theirs.fields[key].contents()


@pytest.mark.parametrize("group", ["row", "tensor"])
@pytest.mark.parametrize("to", TYPES)
def test_ortho_changes_code_bits_only_and_meets_its_target(tiny_base: Path, tmp_path: Path, to: str, group: str) -> None:
    plain_file = plain(tiny_base, tmp_path / "plain.gguf", to)
    report = convert(request(tiny_base, tmp_path / "out.gguf", to, OrthoOptions(group=group)))
    found = compare_files(plain_file, report.outfile, base=tiny_base)
    assert found.only_code_bits
    protected = {rounding.name: rounding for rounding in report.roundings}
    assert len(protected) == 16
    for tensor in found.tensors:
        if tensor.name not in protected:
            assert tensor.codes_changed == 0
            continue
        outcome = protected[tensor.name].outcome
        assert tensor.codes_changed == outcome.n_changed > 0
        assert tensor.largest_step == 1
        assert tensor.alignment == pytest.approx(ortho_target(tensor.ggml_type.name), abs=0.01)
        assert outcome.alignment == pytest.approx(tensor.alignment, abs=1e-3)


@pytest.mark.parametrize("target", [0.5, -0.3])
def test_ortho_target(tiny_base: Path, tmp_path: Path, target: float) -> None:
    report = convert(request(tiny_base, tmp_path / "out.gguf", "q4_k", OrthoOptions(target=target)))
    for rounding in report.roundings:
        assert rounding.outcome.alignment == pytest.approx(target, abs=0.01)


def test_same_seed_same_bytes_other_seed_other_bytes(tiny_base: Path, tmp_path: Path) -> None:
    what = request(tiny_base, tmp_path / "a.gguf")
    convert(replace(what, seed=7))
    convert(replace(what, seed=7, outfile=str(tmp_path / "b.gguf"), options=replace(what.options, threads=1)))
    convert(replace(what, outfile=str(tmp_path / "c.gguf")))
    convert(replace(what, outfile=str(tmp_path / "d.gguf")))
    a, b, c, d = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    assert qguard_metadata(GgufFile(tmp_path / "c.gguf"))["seed"] != qguard_metadata(GgufFile(tmp_path / "d.gguf"))["seed"]


def test_metadata_says_what_was_done(tiny_base: Path, tmp_path: Path) -> None:
    report = convert(replace(request(tiny_base, tmp_path / "out.gguf"), seed=11, keep_plain=True))
    entries = qguard_metadata(GgufFile(report.outfile))
    assert entries["defense"] == "ortho"
    assert entries["params"] == {"group": "row", "target": None, "width": 0.5}  # None: by type
    assert entries["seed"] == "11"
    assert report.plain is not None
    for key, path in (("base.sha256", tiny_base), ("plain.sha256", report.plain)):
        import hashlib

        assert entries[key] == hashlib.sha256(path.read_bytes()).hexdigest()
    flips = sum(rounding.outcome.n_changed for rounding in report.roundings)
    weights = sum(rounding.n_weights for rounding in report.roundings)
    assert entries["share_flipped"] == pytest.approx(flips / weights, rel=1e-6)
    assert str(tmp_path).encode() not in report.outfile.read_bytes()


def test_folder_and_gguf_input_give_the_same_tensors(tiny_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    convert(replace(request(tiny_folder, tmp_path / "a.gguf"), seed=3))
    convert(replace(request(tiny_base, tmp_path / "b.gguf"), seed=3))
    assert compare_files(tmp_path / "a.gguf", tmp_path / "b.gguf").codes_changed == 0


@pytest.mark.parametrize("base_type", ["f32", "f16", "bf16"])
def test_base_types(tiny_folder: Path, tmp_path: Path, base_type: str) -> None:
    report = convert(request(tiny_folder, tmp_path / "model-{ftype}.gguf", base_type))
    assert report.outfile.name == f"model-{base_type}.gguf"
    kinds = {tensor.ggml_type.name for tensor in GgufFile(report.outfile).tensors.values() if len(tensor.shape) == 2}
    assert kinds == {base_type.upper()}
    hardened = convert(request(report.outfile, tmp_path / "q.gguf", "q4_k"))
    for rounding in hardened.roundings:
        assert rounding.outcome.alignment == pytest.approx(ortho_target(rounding.ggml_type.name), abs=0.01)


def test_quantized_input_needs_a_word(tiny_base: Path, tmp_path: Path) -> None:
    quantized = plain(tiny_base, tmp_path / "q8.gguf", "q8_0")
    what = request(quantized, tmp_path / "out.gguf")
    with pytest.raises(UnsupportedError, match="--allow-requantize"):
        convert(what)
    report = convert(replace(what, options=replace(what.options, allow_requantize=True)))
    assert "second rounding" in report.warnings[0]
    for rounding in report.roundings:
        assert rounding.outcome.alignment == pytest.approx(ortho_target(rounding.ggml_type.name), abs=0.01)


def test_split_input(tiny_base: Path, tmp_path: Path) -> None:
    """Two shards written with gguf's own writer, given by the first."""
    shards = copy_gguf(tiny_base, tmp_path / "m.gguf", shard_tensors=10)
    assert len(shards) > 1
    convert(replace(request(shards[0], tmp_path / "split.gguf"), seed=1))
    convert(replace(request(tiny_base, tmp_path / "whole.gguf"), seed=1))
    assert compare_files(tmp_path / "split.gguf", tmp_path / "whole.gguf").codes_changed == 0


def test_existing_output_and_same_file(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match="--overwrite"):
        convert(request(tiny_base, out))
    assert out.read_bytes() == b"precious"
    with pytest.raises(OutputError, match="same file"):
        convert(replace(request(tiny_base, tiny_base), overwrite=True))
    convert(replace(request(tiny_base, out), overwrite=True))
    assert out.read_bytes()[:4] == b"GGUF"


def test_unwritable_and_missing_folders(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        convert(request(tiny_base, tmp_path / "no" / "out.gguf"))
    with pytest.raises(OutputError, match="is a folder"):
        convert(request(tiny_base, tmp_path))
    with pytest.raises(SourceError, match="hub id"):
        convert(request(tmp_path / "no" / "such" / "model", tmp_path / "out.gguf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(QGuardError, match=r"config.json"):
        convert(request(tmp_path / "empty", tmp_path / "out.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_folder_without_safetensors(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(QGuardError, match="safetensors"):
        convert(request(folder, tmp_path / "out.gguf"))


def test_load_check_decodes(tiny_base: Path, tmp_path: Path) -> None:
    report = convert_model(request(tiny_base, tmp_path / "out.gguf"))
    assert report.loaded is not None
    assert len(report.loaded.tokens) == 10


def test_a_file_that_does_not_load_gets_no_name(tiny_base: Path, tmp_path: Path) -> None:
    """The override makes a file that quantizes but cannot be loaded: its feed-forward width is not what the metadata says."""
    what = request(tiny_base, tmp_path / "out.gguf")
    broken = replace(what.options, override_kv=("llama.feed_forward_length=int:100",))
    with pytest.raises(LoadCheckError, match=r"llama.cpp"):
        convert_model(replace(what, options=broken))
    assert list(tmp_path.iterdir()) == []


def test_load_check_refuses_garbage(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LoadCheckError):
        load_check(tmp_path / "x.gguf")


@pytest.mark.parametrize("delay", [0.2, 0.8, 1.6, 2.4])
def test_killed_at_any_moment_leaves_no_output(tiny_base: Path, tmp_path: Path, delay: float) -> None:
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "qguard_edge", "convert", str(tiny_base), "--to", "q4_k", "-o", str(out), "-q"]
    child = subprocess.Popen(command, start_new_session=True)
    time.sleep(delay)
    done = child.poll() is not None
    if not done:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if out.exists():
        load_check(out)  # it may only exist whole
    # What was seen of the activations is kept for the next run, which removes it.
    kept = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".qguard-")}
    assert kept <= {"out.gguf", activations_folder(out).name}
    assert subprocess.run([*command, "--overwrite"], check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".qguard-")] == ["out.gguf"]
