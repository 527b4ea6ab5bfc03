"""The default defense where it must not depend on transformers: models that only llama.cpp runs, and 4-bit floats."""

import json
import os
import sys
from pathlib import Path

import pytest

from convert.diff import compare_files
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.report import GgufReport
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions, FeedbackOptions
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.runtimes.fidelity import measure_fidelity
from tests.helpers.activation_models import make_pair
from tests.helpers.command import CommandLine
from tests.helpers.gguf_copies import copy_gguf
from tests.helpers.hf_models import PROMPTS

TEXT = ("--calib-samples", "8", "--calib-seqlen", "64")


def hardened_by_feedback(document: dict[str, object]) -> bool:
    """Whether a conversion's document says so, for every matrix but an embedding."""
    activations = document["activations"]
    assert isinstance(activations, dict)
    assert isinstance(document["entropy_bits"], float)
    return (
        document["defense"] == "feedback"
        and activations["unseen"] == ["token_embd.weight"]
        and activations["tokens"] == 512
        and document["entropy_bits"] > 0
        and document["load_check"] is not None
    )


def test_an_architecture_that_transformers_does_not_know(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    from transformers import AutoModelForCausalLM

    (base,) = copy_gguf(tiny_base, tmp_path / "base.gguf", architecture="internlm2")
    with pytest.raises(ValueError, match="internlm2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=base.name)
    done = cli("convert", base, "--to", "q4_k", "-o", tmp_path / "out.gguf", "--threads", "1", "--json", *TEXT)
    assert done.returncode == 0, done.stderr
    assert hardened_by_feedback(json.loads(done.stdout))
    assert GgufFile(tmp_path / "out.gguf").get("general.architecture") == "internlm2"


def test_a_gguf_alone_where_transformers_is_not_installed(
    tiny_base: Path, tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither this process nor its children can import it; there is no folder either."""
    (tmp_path / "transformers.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = cli("convert", tiny_base, "--to", "q4_k", "-o", tmp_path / "out.gguf", "--threads", "1", "--json", *TEXT)
    assert done.returncode == 0, done.stderr
    assert hardened_by_feedback(json.loads(done.stdout))


def convert(base: Path, out: Path, to: str, defense: DefenseOptions, *pairs: tuple[str, str]) -> GgufReport:
    return convert_model(
        GgufRequest(
            model=str(base),
            options=QuantizeOptions(parse_file_type(to), threads=1, tensor_types=pairs),
            defense=defense,
            outfile=out,
            seed=3,
            calibration=CalibrationOptions(samples=16, seqlen=64),
            keep_plain=True,
        )
    )


@pytest.mark.parametrize("ggml_type", ["mxfp4", "nvfp4"])
def test_four_bit_floats(tiny_base: Path, tmp_path: Path, ggml_type: str) -> None:
    """All matrices of the blocks; no file type gives these to a dense model by itself."""
    report = convert(tiny_base, tmp_path / "out.gguf", "q8_0", FeedbackOptions(), (r"blk\..*", ggml_type))
    assert report.plain is not None
    assert report.loaded is not None
    found = compare_files(report.plain, report.outfile, base=tiny_base)
    assert found.only_code_bits
    forced = [tensor for tensor in found.tensors if tensor.ggml_type.name == ggml_type.upper()]
    assert len(forced) == 14
    assert all(tensor.alignment is not None and abs(tensor.alignment) < 0.08 for tensor in forced)
    plain, hardened = (measure_fidelity(tiny_base, path, PROMPTS, threads=1) for path in (report.plain, report.outfile))
    assert hardened.mean_kl < 0.8 * plain.mean_kl


def test_the_experts_of_an_mxfp4_file(tmp_path: Path) -> None:
    base = make_pair("qwen3-moe", tmp_path, base_type="bf16").base.path
    report = convert(base, tmp_path / "out.gguf", "mxfp4_moe", FeedbackOptions())
    assert report.plain is not None
    assert report.activations is not None
    experts = [rounding for rounding in report.roundings if "_exps" in rounding.name]
    assert {rounding.ggml_type.name for rounding in experts} == {"MXFP4"}
    assert {name for name in report.activations.unseen if "_exps" in name} == set()
    assert all(rounding.bits > 0 and abs(rounding.outcome.alignment) < 0.08 for rounding in experts)
    assert compare_files(report.plain, report.outfile).only_code_bits
    plain, hardened = (measure_fidelity(base, path, PROMPTS, threads=1) for path in (report.plain, report.outfile))
    assert hardened.mean_kl < plain.mean_kl
