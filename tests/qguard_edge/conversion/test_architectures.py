"""Every built-in family through the whole command, and the way out for the others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from convert.diff import compare_files
from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DEFAULT_DEFENSE, OrthoOptions, parse_defense
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.runtimes.fidelity import measure_fidelity
from quant_grids.errors import UnsupportedError
from tests.helpers.command import CommandLine
from tests.helpers.hf_models import CASES, PROMPTS, Case, make_model, save_model
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

TOKENIZER = train_byte_bpe(digits_then_bytes())
ONE_PER_FAMILY = list({case.family: case for case in reversed(CASES)}.values())


def make_folder(case: Case, folder: Path) -> Path:
    save_model(case, make_model(case), folder)
    save_tokenizer(TOKENIZER, folder)
    return folder


def request(folder: Path, out: Path) -> GgufRequest:
    options = QuantizeOptions(parse_file_type("q4_k"), threads=1)
    return GgufRequest(model=str(folder), options=options, defense=OrthoOptions(), outfile=str(out), device="cpu", seed=1)


@pytest.mark.parametrize("case", ONE_PER_FAMILY, ids=lambda case: case.family)
def test_every_family_by_the_default_defense(case: Case, tmp_path: Path) -> None:
    """The inputs of every matrix are seen, the draws are random, and llama.cpp runs what comes out: nearer than plain."""
    folder = make_folder(case, tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(PROMPTS * 20))
    asked = replace(
        request(folder, tmp_path / "out.gguf"),
        defense=parse_defense(DEFAULT_DEFENSE),
        calibration=CalibrationOptions(tmp_path / "text.txt", samples=16, seqlen=64),
        keep_plain=True,
    )
    report = convert_model(asked)
    assert report.defense is not None
    assert report.defense.name == "feedback"
    assert report.loaded is not None
    assert report.loaded.tokens
    assert report.coverage is not None
    assert report.coverage.protected_share == 1.0
    assert report.activations is not None
    # An embedding's rows are looked up: no product reads it, unless it is the output matrix too.
    assert set(report.activations.unseen) <= {"token_embd.weight", "position_embd.weight"}
    for rounding in report.roundings:
        assert rounding.bits > 0, rounding.name
        assert rounding.outcome.alignment < 0.08, rounding.name
    assert report.plain is not None
    write_base_gguf(folder, tmp_path / "base.gguf")
    plain, hardened = (
        measure_fidelity(tmp_path / "base.gguf", path, PROMPTS, threads=1) for path in (report.plain, report.outfile)
    )
    assert hardened.mean_kl < plain.mean_kl


def test_the_command_lists_them(cli: CommandLine) -> None:
    listed = json.loads(cli("architectures", "--json").stdout)["architectures"]
    names = {name for entry in listed for name in entry["architectures"]}
    assert {"LlamaForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel"} <= names
    assert len(listed) >= len(ONE_PER_FAMILY)


def foreign(folder: Path, target: Path) -> Path:
    """The same folder under an architecture that nobody knows."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["architectures"] = ["MysteryForCausalLM"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_unsupported_architecture_names_the_ways_out(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGUARD_CACHE", str(tmp_path / "cache"))
    folder = foreign(tiny_folder, tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"MysteryForCausalLM.*qguard-edge converter install.*--converter.*GGUF"):
        convert_model(request(folder, tmp_path / "out.gguf"))


@pytest.mark.parametrize("by", ["option", "environment"])
def test_external_converter_makes_the_base(
    tiny_folder: Path, tiny_base: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script with llama.cpp's command line stands for its converter; it copies a base that was made from the same model."""
    folder = foreign(tiny_folder, tmp_path / "model")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(f"import shutil, sys\nshutil.copy({str(tiny_base)!r}, sys.argv[sys.argv.index('--outfile') + 1])\n")
    made = request(folder, tmp_path / "out.gguf")
    if by == "option":
        made = replace(made, converter=script)
    else:
        monkeypatch.setenv("LLAMA_CPP_ROOT", str(tmp_path))
    report = convert_model(made)
    assert "convert_hf_to_gguf.py" in report.warnings[0]
    write_base_gguf(tiny_folder, tmp_path / "own.gguf")
    convert_model(request(tmp_path / "own.gguf", tmp_path / "expected.gguf"))
    assert compare_files(tmp_path / "expected.gguf", report.outfile).codes_changed == 0


def test_environment_does_not_replace_what_is_built_in(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('must not run')\n")
    monkeypatch.setenv("LLAMA_CPP_ROOT", str(tmp_path))
    assert convert_model(request(tiny_folder, tmp_path / "out.gguf")).outfile.is_file()
