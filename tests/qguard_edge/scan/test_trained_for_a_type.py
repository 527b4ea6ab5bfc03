"""Weights that lie on the levels of a type, as those of a model that was trained for it (QAT) do."""

import json
from pathlib import Path

import pytest

from tests.helpers.command import CommandLine

QUIET = ("--threads", "1", "--quiet", "--no-scan", "--no-load-check")


@pytest.fixture(params=["f32", "bf16"])
def on_levels(request: pytest.FixtureRequest, tiny_base: Path, cli: CommandLine, tmp_path: Path) -> Path:
    """The tiny model with every matrix on the levels of Q4_0, in full precision."""
    quantized, made = tmp_path / "q4_0.gguf", tmp_path / "on-levels.gguf"
    assert cli("convert", tiny_base, "--to", "q4_0", "--pure", "--defense", "none", *QUIET, "-o", quantized).returncode == 0
    done = cli("convert", quantized, "--to", request.param, "--allow-requantize", *QUIET, "-o", made)
    assert done.returncode == 0, done.stderr
    return made


def test_scan_names_the_type(on_levels: Path, tiny_base: Path, cli: CommandLine) -> None:
    found = json.loads(cli("scan", on_levels, "--json").stdout)["findings"]
    named = [one for one in found if one["code"] == "QG106" and "trained for this type (QAT)" in one["message"]]
    assert [one["message"].partition(":")[0] for one in named] == ["Q4_0"]
    assert "--to q4_0 keeps them" in named[0]["message"]
    clean = json.loads(cli("scan", tiny_base, "--json").stdout)["findings"]
    assert not [one for one in clean if one["code"] == "QG106"]


def test_hardening_leaves_a_weight_on_its_level(on_levels: Path, cli: CommandLine, tmp_path: Path) -> None:
    """Nothing is rounded there, so there is nothing to choose: the codes are plain's, by the default defense too."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 20)
    done = cli(
        "convert", on_levels, "--to", "q4_0", "--pure", *QUIET, "--seed", "1", "--keep-plain", "-o", tmp_path / "out.gguf",
        "--calib", text, "--calib-samples", "4", "--calib-seqlen", "32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(cli("diff", tmp_path / "out.plain.gguf", tmp_path / "out.gguf", "--json").stdout)
    assert found["only_code_bits"]
    assert found["codes_changed"] == 0


def test_convert_needs_no_type_where_the_weights_name_it(on_levels: Path, cli: CommandLine, tmp_path: Path) -> None:
    done = cli("convert", on_levels, "--pure", "--defense", "ortho", "--no-load-check", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--to q4_0: the weights of " in done.stderr
    assert "trained for it (QAT)" in done.stderr
    assert [made.name for made in tmp_path.glob("*Q4_0.gguf")] == [f"{on_levels.stem}-Q4_0.gguf"]


def test_convert_asks_for_a_type_where_they_do_not(tiny_base: Path, cli: CommandLine, tmp_path: Path) -> None:
    done = cli("convert", tiny_base, cwd=tmp_path)
    assert done.returncode == 2
    assert "which type? Give --to, for example --to q4_k" in done.stderr
    assert not list(tmp_path.iterdir())
