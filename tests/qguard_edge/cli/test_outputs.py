"""No command destroys a file that it was not asked to replace: every one of these cost a file, with exit code 0."""

import threading
from pathlib import Path

import pytest

from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.cli import run
from tests.helpers.command import CommandLine

CONVERT = ["convert", "b.gguf", "--to", "q4_k", "--defense", "none", "--no-load-check", "--no-scan", "--threads", "1", "-o"]
PLAN = ["plan", "b.gguf", "--base", "b.gguf", "--plain", "p.gguf", "--defense", "ortho", "--no-scan"]
ASKED = ["--suites", "drift", "--text", "t.txt", "--limit", "2", "--threads", "1"]
VERIFY = ["verify", "p.gguf", "--base", "b.gguf", *ASKED]


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "p.gguf"
    quantize(tiny_base, path, QuantizeOptions(parse_file_type("q4_0"), threads=1))
    return path


@pytest.fixture
def place(tiny_base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, plain, a text, and files that are nobody's business."""
    (tmp_path / "b.gguf").write_bytes(tiny_base.read_bytes())
    (tmp_path / "p.gguf").write_bytes(plain.read_bytes())
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "precious").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


DESTROYERS = {
    "the base becomes a report": [*CONVERT, "o.gguf", "--report", "b.gguf"],
    "the base becomes a report, although --overwrite": [*CONVERT, "o.gguf", "--report", "b.gguf", "--overwrite"],
    "the output becomes its own report": [*CONVERT, "o.gguf", "--report", "o.gguf"],
    "a report replaces a file": [*CONVERT, "o.gguf", "--report", "precious"],
    "plan replaces its base": [*PLAN, "-o", "b.gguf", "--overwrite"],
    "plan replaces a file": [*PLAN, "-o", "precious"],
    "apply replaces its plan": ["apply", "precious", "--plain", "p.gguf", "-o", "precious", "--overwrite"],
    "baseline replaces its base": ["baseline", "b.gguf", *ASKED, "-o", "b.gguf"],
    "baseline replaces a file": ["baseline", "b.gguf", *ASKED, "-o", "precious"],
    "imatrix replaces its model": ["imatrix", "b.gguf", "--text", "t.txt", "-o", "b.gguf"],
    "imatrix replaces its text": ["imatrix", "b.gguf", "--text", "t.txt", "-o", "t.txt"],
    "imatrix replaces a file": ["imatrix", "b.gguf", "--text", "t.txt", "-o", "precious"],
    "verify's page replaces a file": [*VERIFY, "--html", "precious"],
    "verify's page replaces the candidate": [*VERIFY, "--html", "p.gguf"],
    "verify's reports replace each other": [*VERIFY, "--html", "r", "--sarif", "./r"],
    "verify's folder is a file": [*VERIFY, "-o", "precious"],
    "check's report replaces the pack": ["check", "p.gguf", "--baseline", "precious", "--junit", "precious", "--overwrite"],
    "scan's report replaces the model": ["scan", "b.gguf", "--html", "b.gguf"],
    "scan's report replaces a file": ["scan", "b.gguf", "--sarif", "precious"],
    "compare's plot replaces a file": ["compare", "b.gguf", "--to", "q4_0", "--plot", "precious"],
    "compare's plot replaces the text": [
        "compare", "b.gguf", "--to", "q4_0", "--text", "t.txt", "--plot", "t.txt", "--overwrite"
    ],
    "the lab's folder is a file": ["lab", "run", "-o", "precious"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", DESTROYERS.values(), ids=DESTROYERS.keys())
def test_no_file_is_lost(arguments: list[str], place: Path, cli: CommandLine) -> None:
    before = contents(place)
    done = cli(*arguments)
    assert done.returncode == 2
    assert "internal error" not in done.stderr
    assert contents(place) == before


def test_a_rejected_file_of_before_is_not_replaced(place: Path, cli: CommandLine) -> None:
    (place / "o.rejected.gguf").write_text("years of work")
    done = cli(*CONVERT, "o.gguf", "--verify", "drift")
    assert done.returncode == 2
    assert "o.rejected.gguf exists; pass --overwrite" in done.stderr


def test_an_output_folder_with_an_input_in_it_is_not_replaced(tiny_folder: Path, place: Path, cli: CommandLine) -> None:
    out = place / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "my.txt").write_text("years of work")
    done = cli("convert", tiny_folder, "--to", "nf4", "-o", out, "--calib", out / "my.txt", "--overwrite")
    assert done.returncode == 2
    assert "would be lost" in done.stderr
    assert (out / "my.txt").read_text() == "years of work"


def test_two_conversions_to_one_name_do_not_both_succeed(place: Path) -> None:
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(run([*CONVERT, "o.gguf", "-q"]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [0, 2]
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_an_existing_report_is_replaced_when_asked(place: Path, cli: CommandLine) -> None:
    assert cli("scan", "b.gguf", "--html", "precious", "--overwrite", "-q").returncode in (0, 1)
    assert (place / "precious").read_text().startswith("<!doctype html>")
