"""`convert` looks first: refuses, accepts, keeps in full precision."""

import json
from pathlib import Path

import pytest

from convert.gguf_file import GgufFile
from qguard_edge.cli import run
from qguard_edge.conversion.outputs.gguf import GgufOutput
from qguard_edge.lab.demo import MODEL
from tests.helpers.checkpoints import copy_with


def convert(capfd: pytest.CaptureFixture[str], model: Path, out: Path, *flags: str) -> tuple[int, dict]:  # type: ignore[type-arg]
    code = run(["convert", str(model), "-o", str(out), "--json", "--no-load-check", "--seed", "1", "--threads", "1", *flags])
    return code, json.loads(capfd.readouterr().out)


def test_outliers_are_refused_before_anything_is_written(
    outlier_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, document = convert(capfd, outlier_victim, tmp_path / "out.gguf", "--to", "q4_0")
    assert code == 1
    assert document["status"] == "refused"
    assert [finding["code"] for finding in document["findings"] if finding["severity"] == "dangerous"] == ["QG201"]
    assert list(tmp_path.iterdir()) == []


def test_boxes_of_the_written_type_are_refused_and_of_another_are_not(
    gap_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, document = convert(capfd, gap_victim, tmp_path / "out.gguf", "--to", "q4_k")
    assert code == 1
    assert "QG301" in {finding["code"] for finding in document["findings"]}
    assert list(tmp_path.iterdir()) == []
    code, document = convert(capfd, gap_victim, tmp_path / "out.gguf", "--to", "q5_1", "--pure")
    assert code == 0
    assert not [finding for finding in document["scan"]["findings"] if finding["severity"] == "dangerous"]


def test_boxes_are_refused_before_the_minutes_that_activations_take(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GgufOutput, "see_activations", None)  # nothing may get this far
    code, document = convert(capfd, MODEL, tmp_path / "out.gguf", "--to", "q4_k")
    assert code == 1
    assert document["status"] == "refused"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--accept-findings", "--no-scan"])
def test_a_dangerous_model_can_be_converted_knowingly(
    flag: str, outlier_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, document = convert(capfd, outlier_victim, tmp_path / "out.gguf", "--to", "q4_0", flag)
    assert code == 0
    assert (tmp_path / "out.gguf").is_file()
    assert ("scan" in document) == (flag == "--accept-findings")


def test_flagged_tensors_stay_in_full_precision_and_the_rest_is_verified(
    outlier_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    code, document = convert(capfd, outlier_victim, out, "--to", "q4_0", "--keep-flagged-f16", "--verify", "drift")
    assert document["scan"]["kept"] == ["blk.2.ffn_up.weight"]
    assert document["verification"]["verdict"] in ("pass", "fail", "inconclusive")
    assert code == {"pass": 0, "fail": 1, "inconclusive": 3}[document["verification"]["verdict"]]
    written = GgufFile(next(tmp_path.glob("out*.gguf")))
    types = {name: tensor.ggml_type.name for name, tensor in written.tensors.items()}
    assert types["blk.2.ffn_up.weight"] == "BF16"
    assert types["blk.1.ffn_up.weight"] == "Q4_0"


@pytest.mark.parametrize(
    "flags",
    [
        ["--keep-flagged-f16"],
        ["--keep-flagged-f16", "--accept-findings", "--verify", "drift"],
        ["--no-scan", "--accept-findings"],
    ],
)
def test_contradictions_are_refused(
    flags: list[str], tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, document = convert(capfd, tiny_folder, tmp_path / "out.gguf", "--to", "q4_0", *flags)
    assert code == 2
    assert "--" in document["error"]


def test_a_base_for_llama_quantize_is_scanned_too(
    outlier_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--to", "gguf", "--target", "q4_0")
    code, document = convert(capfd, outlier_victim, tmp_path / "out.gguf", *flags)
    assert code == 1
    assert document["status"] == "refused"
    assert list(tmp_path.iterdir()) == []
    code, document = convert(capfd, outlier_victim, tmp_path / "out.gguf", *flags, "--accept-findings")
    assert code == 0
    assert document["scan"]["findings"]


def test_folders_for_bitsandbytes_are_scanned_too(
    outlier_victim: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, document = convert(capfd, outlier_victim, tmp_path / "out", "--to", "nf4")
    assert code == 1
    assert document["status"] == "refused"
    assert list(tmp_path.iterdir()) == []


def test_a_broken_model_cannot_be_kept(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = copy_with(tiny_folder, tmp_path / "model", "model.layers.0.mlp.up_proj.weight", float("inf"))
    flags = ["--to", "q4_0", "--keep-flagged-f16", "--verify", "drift"]
    code, document = convert(capfd, broken, tmp_path / "out.gguf", *flags)
    assert code == 1
    assert "QG101" in document["error"]
