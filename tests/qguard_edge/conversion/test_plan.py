"""A plan made and applied in two steps is the conversion in one; plans that lie are refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.atomic import OutputError
from convert.diff import compare_files, qguard_metadata
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.outputs.plan import apply_to
from qguard_edge.conversion.plan_file import PlanError, read_plan, write_plan
from qguard_edge.conversion.request import GgufRequest, PlanRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import (
    DefenseOptions,
    EfrapOptions,
    NoiseOptions,
    OrthoOptions,
    QuantGuardOptions,
)
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.progress import NoProgress
from quant_grids.errors import UnsupportedError


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    quantize(tiny_base, path, QuantizeOptions(parse_file_type("q4_k"), threads=2))
    return path


def plan_request(folder: Path, base: Path, plain: Path, out: Path, defense: DefenseOptions, text: Path) -> PlanRequest:
    calibration = CalibrationOptions(text, samples=32, seqlen=24)
    # As many threads as the conversion it is compared with: how sums are split decides their last bit, and that a learned flip.
    return PlanRequest(
        model=str(folder),
        base=base,
        plain=plain,
        outfile=out,
        defense=defense,
        device="cpu",
        seed=5,
        threads=2,
        calibration=calibration,
    )


@pytest.mark.parametrize("defense", [OrthoOptions(), EfrapOptions(steps=2, alignment=0.1)], ids=str)
def test_plan_and_apply_are_convert(
    tiny_folder: Path, tiny_base: Path, plain: Path, text: Path, tmp_path: Path, defense: DefenseOptions
) -> None:
    plan, out, whole = tmp_path / "plan.safetensors", tmp_path / "out.gguf", tmp_path / "whole.gguf"
    planned = convert_model(plan_request(tiny_folder, tiny_base, plain, plan, defense, text))
    applied = apply_to(plan, plain, out, overwrite=False, progress=NoProgress())
    request = GgufRequest(
        model=str(tiny_folder),
        options=QuantizeOptions(parse_file_type("q4_k"), threads=2),
        defense=defense,
        outfile=str(whole),
        device="cpu",
        seed=5,
        check_loads=False,
        calibration=CalibrationOptions(text, samples=32, seqlen=24),
    )
    report = convert_model(request)
    assert out.read_bytes() == whole.read_bytes()
    assert sum(applied.changed.values()) == planned.outcome.n_changed == sum(r.outcome.n_changed for r in report.roundings)
    assert planned.outcome.n_changed > 0
    assert compare_files(plain, out).only_code_bits
    metadata = qguard_metadata(GgufFile(out))
    assert metadata["seed"] == "5"
    assert ("calibration.sha256" in metadata) == defense.calibrated
    assert plan.stat().st_size < plain.stat().st_size


@pytest.mark.usefixtures("steps_taken")
def test_a_plan_by_transformers_activations_is_as_good_as_convert(
    tiny_folder: Path, tiny_base: Path, plain: Path, text: Path, tmp_path: Path
) -> None:
    """Without llama.cpp activations are seen in transformers: other last bits, so other draws, but the same rule."""
    plan, out = tmp_path / "plan.safetensors", tmp_path / "out.gguf"
    options = QuantGuardOptions(steps=2, rate=0.2)
    planned = convert_model(plan_request(tiny_folder, tiny_base, plain, plan, options, text))
    applied = apply_to(plan, plain, out, overwrite=False, progress=NoProgress())
    assert sum(applied.changed.values()) == planned.outcome.n_changed > 0
    assert planned.learned is not None
    assert planned.learned.moved > 0
    assert planned.outcome.alignment == pytest.approx(0, abs=0.03)
    assert compare_files(plain, out).only_code_bits
    metadata = qguard_metadata(GgufFile(out))
    assert metadata["calibration.sha256"] == planned.learned.calibration_sha256
    assert metadata["entropy.bits"] == pytest.approx(planned.entropy_bits, rel=1e-6)


def test_a_plan_belongs_to_one_plain_file(
    tiny_folder: Path, tiny_base: Path, plain: Path, text: Path, tmp_path: Path
) -> None:
    plan, other = tmp_path / "plan.safetensors", tmp_path / "other.gguf"
    convert_model(plan_request(tiny_folder, tiny_base, plain, plan, OrthoOptions(), text))
    quantize(tiny_base, other, QuantizeOptions(parse_file_type("q4_0"), threads=2))
    with pytest.raises(PlanError, match="another SHA-256"):
        apply_to(plan, other, tmp_path / "out.gguf", overwrite=False, progress=NoProgress())
    with pytest.raises(OutputError, match="same file"):
        apply_to(plan, plain, plain, overwrite=True, progress=NoProgress())
    with pytest.raises(OutputError):
        apply_to(plan, plain, tmp_path / "no" / "out.gguf", overwrite=False, progress=NoProgress())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(UnsupportedError, match="scales anew"):
        convert_model(plan_request(tiny_folder, tiny_base, plain, plan, NoiseOptions(), text))


def test_hostile_plans_are_refused(tiny_folder: Path, tiny_base: Path, plain: Path, text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.safetensors"
    convert_model(plan_request(tiny_folder, tiny_base, plain, plan, OrthoOptions(), text))
    good, header = load_file(plan), {"format": "qguard-plan-2", "plan": json.dumps(dict(read_plan(plan).header))}
    name = "blk.0.ffn_up.weight"

    def refused(said: str, tensors: dict[str, np.ndarray], head: dict[str, str]) -> None:
        bad = tmp_path / "bad.safetensors"
        save_file(tensors, bad, head)
        with pytest.raises(PlanError, match=said):
            apply_to(bad, plain, tmp_path / "out.gguf", overwrite=False, progress=NoProgress())
        assert not (tmp_path / "out.gguf").exists()

    refused("no rounding plan", good, {"format": "pt"})
    refused("not JSON", good, {**header, "plan": "{"})
    refused("names no plain file", good, {**header, "plan": "[]"})
    refused("does not have", good | {"x.moved": good[f"{name}.moved"], "x.up": good[f"{name}.up"]}, header)
    refused("is \\[2, 32\\]", good | {f"{name}.moved": good[f"{name}.moved"][:2]}, header)
    refused("bytes of directions", good | {f"{name}.up": good[f"{name}.up"][:2]}, header)
    everything = np.full_like(good[f"{name}.moved"], 255)
    up = np.full(everything.size, 255, np.uint8)
    refused("out of the range", good | {f"{name}.moved": everything, f"{name}.up": up}, header)
    raw = json.loads(header["plan"])
    refused("no metadata", good, {**header, "plan": json.dumps({**raw, "metadata": {"a": [1]}})})
    (tmp_path / "junk").write_bytes(b"\xff" * 40)
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path / "junk")


def test_the_torch_side_needs_no_llama_cpp(
    tiny_folder: Path, tiny_base: Path, plain: Path, text: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "sys.modules['llama_cpp'] = None\n"  # importing it is an error now
        "from qguard_edge.cli import run\n"
        "assert run(sys.argv[1:]) == 0\n"
    )
    command = [sys.executable, "-c", code, "plan", str(tiny_folder), "--base", str(tiny_base), "--plain", str(plain)]
    command += ["-o", str(tmp_path / "p.safetensors"), "--quantguard-steps", "2", "--calib", str(text), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["learned"]["samples"] == 40
    assert document["alignment"] == pytest.approx(0, abs=0.03)
    command = [sys.executable, "-c", code, "apply", str(tmp_path / "p.safetensors"), "--plain", str(plain)]
    done = subprocess.run([*command, "-o", str(tmp_path / "o.gguf")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing else; wrote o.gguf" in done.stdout


def test_one_plan_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    """safetensors writes its metadata as a hash map has it: half the plans of one seed differed from the others."""
    header = {"plain_sha256": "0" * 64, "options": {"name": '\x00\x1f\x7f\\"\u20ac\U0001f512'}, "metadata": {}}
    path, made = tmp_path / "plan", set()
    for _ in range(20):
        write_plan(path, {"a.moved": np.ones((2, 3), np.uint8)}, header)
        made.add(path.read_bytes())
    assert len(made) == 1
    assert load_file(path)["a.moved"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert read_plan(path).header["options"] == header["options"]
