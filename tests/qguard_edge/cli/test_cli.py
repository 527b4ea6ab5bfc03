"""The command line as a user meets it: exit codes, one JSON document, one sentence per failure."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, quantize
from tests.helpers.command import CommandLine, program

DRAWN = 0.04
"""Four standard deviations of what the draws add to the alignment of the smallest matrix, 32,768 weights: 0.007 when its lean is
found, and again when it is rounded."""


def test_convert_inspect_diff(tiny_folder: Path, tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    done = cli("convert", tiny_folder, "--to", "Q4_K", "--keep-plain", "--json", "--seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "ok"
    assert report["outfile"] == "tiny-Q4_K_M.gguf"
    assert report["seed"] == 5
    for tensor in report["tensors"]:
        assert tensor["alignment"] == pytest.approx(0, abs=DRAWN), tensor["name"]
    assert str(tmp_path) not in done.stdout

    out, plain = tmp_path / "tiny-Q4_K_M.gguf", tmp_path / "tiny-Q4_K_M.plain.gguf"
    shown = cli("inspect", out, "--json")
    assert json.loads(shown.stdout)["qguard"]["seed"] == "5"

    compared = cli("diff", plain, out, "--base", tiny_base, "--json")
    assert compared.returncode == 0
    document = json.loads(compared.stdout)
    assert document["only_code_bits"]
    assert document["codes_changed"] == sum(tensor["flips"] for tensor in report["tensors"])
    aligned = [tensor for tensor in document["tensors"] if tensor["codes_changed"]]
    assert len(aligned) == 16
    for tensor in aligned:
        assert tensor["alignment"] == pytest.approx(0, abs=DRAWN), tensor["name"]


def test_human_output_names_everything(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    done = cli("convert", tiny_base, "--to", "q4_k", "-v", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"1\.00 -> [+-]?0\.0[0-4]", done.stdout)  # the seed is fresh
    for words in ("Q4_K", "Q6_K", "bits per weight", "seed", "llama.cpp loads it", "wrote"):
        assert words in done.stdout
    assert "\x1b[" not in done.stdout + done.stderr  # no colours, no bars: not a terminal


def test_quiet_says_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """In a process of its own: neither our libraries nor llama.cpp may speak on the way."""
    command = program("convert", tiny_base, "--to", "q8_0", "-q")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_diff_exits_1_when_a_scale_differs(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    from convert.gguf_file import GgufFile

    plain, touched = tmp_path / "a.gguf", tmp_path / "b.gguf"
    quantize(tiny_base, plain, QuantizeOptions(parse_file_type("q4_k")))
    raw = bytearray(plain.read_bytes())
    raw[GgufFile(plain).tensors["blk.0.attn_q.weight"].offset] ^= 1  # the lowest bit of the first block's d
    touched.write_bytes(raw)
    done = cli("diff", plain, touched, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [t["foreign_bytes"] for t in document["tensors"] if t["name"] == "blk.0.attn_q.weight"] == [1]
    assert document["codes_changed"] == 0


def test_diff_exits_1_when_metadata_differs(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    options = QuantizeOptions(parse_file_type("q4_0"))
    quantize(tiny_base, tmp_path / "a.gguf", options)
    quantize(tiny_base, tmp_path / "b.gguf", QuantizeOptions(options.file_type, override_kv=("general.name=str:x",)))
    done = cli("diff", tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert done.returncode == 1
    assert "general.name" in done.stdout


def test_diff_of_other_layouts_is_an_error(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    quantize(tiny_base, tmp_path / "a.gguf", QuantizeOptions(parse_file_type("q4_0")))
    done = cli("diff", tiny_base, tmp_path / "a.gguf")
    assert done.returncode == 2
    assert "same layout" in done.stderr


def test_dry_run_writes_nothing(tiny_folder: Path, tmp_path: Path, cli: CommandLine) -> None:
    done = cli("convert", tiny_folder, "--to", "q4_k", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["outfile"] == "tiny-Q4_K_M.gguf"
    assert {tensor["target_type"] for tensor in plan["tensors"]} == {"F32", "Q4_K", "Q6_K"}
    assert list(tmp_path.iterdir()) == []
    cli("convert", tiny_folder, "--to", "q4_k", "-q", cwd=tmp_path)
    from convert.gguf_file import GgufFile

    made = GgufFile(tmp_path / "tiny-Q4_K_M.gguf")
    assert {t["name"]: t["n_bytes"] for t in plan["tensors"]} == {n: t.n_bytes for n, t in made.tensors.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "{folder}", "--to", "q9"], "not a file type"),
        (["convert", "{folder}"], "--to"),
        (["convert", "missing-model", "--to", "q4_k"], "there is no file or folder"),
        (["convert", "{folder}", "--to", "q4_k", "--defense", "magic"], "choose one of"),
        (["convert", "{folder}", "--to", "q4_k", "--defense", "ortho", "--ortho-target", "7"], "must lie between"),
        (["convert", "{folder}", "--to", "q4_k", "--defense", "ortho", "--ortho-group", "layer"], "row, block, tensor"),
        (["convert", "{folder}", "--to", "q4_k", "--defense", "none", "--ortho-target", "0"], "belongs to --defense ortho"),
        (["convert", "{folder}", "--to", "q4_k", "--device", "tpu"], "auto, cpu or cuda"),
        (["convert", "{folder}", "--to", "q4_k", "--imatrix", "none.dat"], "importance matrix"),
        (["convert", "{folder}", "--to", "q4_k", "--tensor-type", "ffn_down"], "PATTERN=TYPE"),
        (["convert", "{folder}", "--to", "q4_k", "-o", "no/where.gguf"], "does not exist"),
        (["convert", "{folder}", "--to", "gguf"], "--target TYPE"),
        (["convert", "{folder}", "--to", "gguf", "--target", "bf16"], "nothing is rounded"),
        (["convert", "{folder}", "--to", "gguf", "--target", "q4_0", "--verify", "drift"], "does not go with --to gguf"),
        (["convert", "{folder}", "--to", "q4_k", "--target", "q4_0"], "does not go with --to q4_k"),
        (["inspect", "missing.gguf"], "cannot read missing.gguf"),
        (["frobnicate"], "No such command"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    tiny_folder: Path, tmp_path: Path, arguments: list[str], words: str, cli: CommandLine
) -> None:
    filled = [argument.replace("{folder}", str(tiny_folder)) for argument in arguments]
    done = cli(*filled, cwd=tmp_path)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_error_with_json_is_one_document(tmp_path: Path, cli: CommandLine) -> None:
    done = cli("inspect", tmp_path / "missing.gguf", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["status"] == "error"


def test_defenses_lists_every_option(cli: CommandLine) -> None:
    listed = json.loads(cli("defenses", "--json").stdout)["defenses"]
    assert {"none", "ortho"} <= {defense["name"] for defense in listed}
    help_text = " ".join(cli("convert", "--help").stdout.split())
    for defense in listed:
        for option in defense["options"]:
            assert option["flag"] in help_text


def test_version(cli: CommandLine) -> None:
    from qguard_edge import __version__

    assert cli("--version").stdout.strip() == f"qguard-edge {__version__}"
