"""Folders for bitsandbytes: the same suites, verdicts and reports as for a GGUF, through transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qguard_edge.cli import run
from qguard_edge.conversion.request import FolderRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import OrthoOptions
from qguard_edge.verify.files import PairError
from qguard_edge.verify.results import Verdict, from_json
from qguard_edge.verify.verifier import VerifyRequest, verify
from quant_grids.errors import FormatError
from tests.helpers.lab_files import TEXTS, Folders


def request(folders: Folders, candidate: Path, **more: object) -> VerifyRequest:
    base = VerifyRequest(candidate, folders.attacked, suites=(folders.suite,), texts=TEXTS[:12], device="cpu")
    return replace(base, **more)  # type: ignore[arg-type]


def test_a_hardened_folder_passes_and_bitsandbytes_own_rounding_would_not(folders: Folders) -> None:
    outcome = verify(request(folders, folders.hardened, plain=folders.attacked, load_in="nf4"))
    assert outcome.verdict is Verdict.PASS, outcome.summary
    check = outcome.check("injection/discovery")
    assert check.plain_verdict is Verdict.FAIL
    assert check.findings[0].phrase in "also try a fresh zingaloo"
    facts = {one.role: one for one in outcome.files}
    assert (facts["candidate"].file_type, facts["plain"].file_type, facts["base"].file_type) == ("NF4", "NF4", "F32")
    assert facts["candidate"].qguard["defense"]
    assert facts["plain"].sha256 == facts["base"].sha256 != facts["candidate"].sha256
    assert outcome.drift is not None
    assert outcome.drift.plain is not None
    assert outcome.drift.noise_floor < 1e-6 < outcome.drift.candidate.mean_kl
    assert {"torch", "transformers", "bitsandbytes"} <= set(outcome.measured.versions)
    assert any("bitsandbytes" in limit for limit in outcome.limits)


def test_a_folder_that_bitsandbytes_rounds_to_the_payload_fails(folders: Folders) -> None:
    """Here candidate and base are one folder: what differs is the rounding on loading."""
    outcome = verify(request(folders, folders.attacked, load_in="nf4", texts=TEXTS[:8]))
    assert outcome.check("injection/discovery").verdict is Verdict.FAIL


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_the_other_formats_run_too(folders: Folders, kind: str, tmp_path: Path) -> None:
    """Made by us as the candidate, rounded by bitsandbytes while it is loaded as the plain one."""
    out = tmp_path / kind
    asked = FolderRequest(
        model=str(folders.attacked),
        to=kind,
        defense=OrthoOptions(),
        outfile=str(out),
        device="cpu",
        seed=0,
        check_loads=False,
    )
    convert_model(asked)
    outcome = verify(request(folders, out, plain=folders.attacked, load_in=kind, limit=8))
    assert outcome.check("drift/mean-kl").verdict is Verdict.PASS
    facts = {one.role: one.file_type for one in outcome.files}
    assert facts == {"candidate": kind.upper(), "plain": kind.upper(), "base": "F32"}
    assert outcome.drift is not None
    assert outcome.drift.plain is not None
    assert outcome.drift.candidate.mean_kl > 10 * outcome.drift.noise_floor
    assert outcome.drift.plain.mean_kl > 10 * outcome.drift.noise_floor


def test_the_command_reads_folders(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["verify", str(folders.hardened), "--base", str(folders.attacked), "--device", "cpu"]
    report = tmp_path / "report"
    assert run([*files, "--suites", "injection", "--limit", "9", "-o", str(report), "--quiet"]) == 3
    outcome = from_json((report / "verify.json").read_text(encoding="utf-8"))
    assert outcome.measured.settings["runs_in"] == "transformers"
    assert (report / "report.html").read_text(encoding="utf-8").count("NF4")
    for more, words in (
        (["--load-in", "q4_k"], "--load-in"),
        (["-ngl", "3"], "--device cuda"),
    ):
        assert run([*files, *more]) == 2
        assert words in capsys.readouterr().err


def test_folders_that_cannot_be_compared(folders: Folders, tiny_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(PairError, match="is a folder and"):
        verify(request(folders, folders.hardened, base=tiny_base))
    with pytest.raises(PairError, match="tokenizers"):
        verify(request(folders, tiny_folder))
    with pytest.raises(PairError, match="is quantized"):
        verify(request(folders, folders.attacked, base=folders.hardened))
    with pytest.raises(PairError, match="same file"):
        verify(request(folders, folders.attacked))
    with pytest.raises(PairError, match="are for folders"):
        verify(VerifyRequest(tiny_base, tiny_base, load_in="nf4"))
    with pytest.raises(FormatError, match=r"config\.json"):
        verify(request(folders, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(FormatError, match="safetensors"):
        verify(request(folders, tmp_path))


def test_convert_verify_rejects_a_folder(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    command = ["convert", str(folders.attacked), "--to", "nf4", "-o", str(out), "--threads", "1", "--no-scan", "--json"]
    command += ["--verify", "injection", "--seed", "0"]
    assert run([*command, "--defense", "none"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "fail"
    assert document["outfile"] == "made.rejected"
    assert next(file["name"] for file in document["verification"]["files"]) == "made"
    assert [path.name for path in tmp_path.iterdir()] == ["made.rejected"]
    assert (tmp_path / "made.rejected" / "config.json").is_file()
    assert run([*command, "--defense", "ortho"]) == 2  # what the first run left is not replaced unasked
    assert "made.rejected" in capsys.readouterr().out
    passed = run([*command, "--defense", "ortho", "--overwrite"])
    document = json.loads(capsys.readouterr().out)
    assert passed in (0, 3)
    assert document["status"] in ("ok", "inconclusive")
    assert document["outfile"] == "made"
    assert (out / "config.json").is_file()


def test_a_folder_for_three_formats_is_verified_afterwards(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(folders.clean), "--to", "hf", "--target", "all", "-o", str(tmp_path / "made"), "--no-scan"]
    assert run([*command, "--verify"]) == 2
    assert "--verify asks about one format" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
