"""Old names of options: taken, not shown, and refused beside a different value of the new name."""

from pathlib import Path

import pytest

from qguard_edge.cli import run
from qguard_edge.cli.aliases import with_new_names
from quant_grids.errors import UnsupportedError

NAMES = {"--reference": "--base", "--naive": "--plain", "--keep-reference": "--keep-plain"}
FLAGS = {"--keep-plain"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["a", "--reference", "b"], ["a", "--base", "b"]),
        (["--reference=b=c", "--other"], ["--base=b=c", "--other"]),
        (["--base", "b", "--reference=b"], ["--base", "b", "--base=b"]),
        (["--keep-reference", "--keep-plain", "x"], ["--keep-plain", "--keep-plain", "x"]),
        (["--naive", "a", "--base", "b"], ["--plain", "a", "--base", "b"]),
        (["--", "--reference"], ["--", "--reference"]),
    ],
)
def test_old_names_become_new_ones(given: list[str], wanted: list[str]) -> None:
    assert with_new_names(given, NAMES, FLAGS) == wanted


@pytest.mark.parametrize("given", [["--base", "a", "--reference", "b"], ["--naive=a", "x", "--plain", "b"]])
def test_two_values_are_refused(given: list[str]) -> None:
    with pytest.raises(UnsupportedError, match="is the old name of"):
        with_new_names(given, NAMES, FLAGS)


@pytest.mark.parametrize("option", ["--base", "--reference"])
def test_verify_takes_both_names(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert run(["verify", str(tmp_path / "a.gguf"), option, str(tmp_path / "b.gguf")]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_verify_with_two_bases_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "a.gguf", "--base", "b.gguf", "--reference", "c.gguf"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said == "error: --reference is the old name of --base, and they have different values: give --base alone"


@pytest.mark.parametrize(("command", "old"), [("verify", "--reference"), ("verify", "--naive"), ("apply", "--reference")])
def test_old_names_are_not_shown(command: str, old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--plain" in shown
    assert old not in shown
