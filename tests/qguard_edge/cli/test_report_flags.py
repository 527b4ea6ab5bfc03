"""`verify` writes the reports that its options ask for."""

from pathlib import Path

import pytest

from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.cli import run

REPORTS = {"--junit": "testsuites", "--sarif": '"2.1.0"', "--markdown": "drift/mean", "--html": "<!doctype html>"}


def test_verify_writes_all_reports(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate, summary = tmp_path / "candidate.gguf", tmp_path / "summary.md"
    quantize(tiny_base, candidate, QuantizeOptions(parse_file_type("q8_0"), threads=1))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    flags = [part for flag in REPORTS for part in (flag, str(tmp_path / flag.strip("-")))]
    options = ["--suites", "drift", "--limit", "9", "--threads", "1", "-o", str(tmp_path / "out"), "-q"]
    assert run(["verify", str(candidate), "--base", str(tiny_base), *options, *flags]) == 0
    for flag, words in REPORTS.items():
        text = (tmp_path / flag.strip("-")).read_text(encoding="utf-8")
        assert words in text
        assert str(tmp_path) not in text
    assert (tmp_path / "markdown").read_text() in summary.read_text()
    assert not (tmp_path / "out" / "report.html").exists()  # --html chose another place


@pytest.mark.parametrize("flag", REPORTS)
def test_a_report_that_cannot_be_written_is_refused_before_any_work(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = tmp_path / "none.gguf"
    none.write_bytes(b"GGUF")
    assert run(["verify", str(none), "--base", str(none), flag, str(tmp_path / "no" / "where")]) == 2
    assert "does not exist" in " ".join(capsys.readouterr().err.split())
