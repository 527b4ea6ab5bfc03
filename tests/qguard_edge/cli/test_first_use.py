"""What a newcomer meets: slips answered at once and with a way out, the conclusion before the table, better or worse in words."""

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from typer.main import get_command

from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.cli import app
from qguard_edge.cli.console import PlainConsole, say, styled, table
from qguard_edge.conversion.beside_plain import EVERY
from qguard_edge.runtimes.fidelity import BesidePlain, Fidelity, measure_fidelity
from qguard_edge.scan.findings import RULES
from qguard_edge.verify.verifier import built_in_texts
from quant_grids.errors import UnsupportedError
from tests.helpers.command import CommandLine


@pytest.mark.parametrize(
    ("slip", "meant"),
    [("q4km", "Q4_K_M"), ("q8", "Q8_0"), ("q4_k_xl", "Q4_K_M"), ("Q4-K-M", "Q4_K_M"), ("iq4nl", "IQ4_NL"), ("nf-4", "NF4")],
)
def test_a_mistyped_type_is_answered_with_what_was_meant(slip: str, meant: str) -> None:
    with pytest.raises(UnsupportedError, match=f"did you mean {meant}\\b"):
        parse_file_type(slip)


def test_a_type_that_is_like_none_lists_them_all() -> None:
    with pytest.raises(UnsupportedError, match=r"Q4_K_M.*nf4"):
        parse_file_type("zzz")


def test_a_missing_file_is_said_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from qguard_edge.cli import run\n"
        "for words in (['convert', 'no.gguf', '--to', 'q4_k'], ['scan', './no'], ['compare', 'no.gguf', '--to', 'q4_k'],\n"
        "              ['verify', 'no.gguf', '--base', 'x.gguf']): assert run(words) == 2\n"
        "print({'torch', 'llama_cpp', 'transformers', 'scipy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "set()\n"
    assert [line.partition("(")[0].strip() for line in done.stderr.splitlines()] == [
        "error: there is no file 'no.gguf'",
        "error: there is no file or folder './no'",
        "error: there is no file 'no.gguf'",
        "error: CANDIDATE: there is no file or folder no.gguf",
    ]


def test_the_vision_part_of_a_model_is_refused_early(tmp_path: Path, cli: CommandLine) -> None:
    writer = GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_tensor("v.blk.0.attn_q.weight", np.ones((256, 256), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for command in (("convert", "mmproj.gguf", "--to", "q4_k"), ("scan", "mmproj.gguf")):
        done = cli(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert "mmproj" in done.stderr
        assert "language model" in done.stderr


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_tensor_type_that_matches_nothing_is_an_error(
    more: tuple[str, ...], tiny_base: Path, tmp_path: Path, cli: CommandLine
) -> None:
    done = cli("convert", tiny_base, "--to", "q4_k", "--tensor-type", "foo=q6_k", *more, cwd=tmp_path)
    assert done.returncode == 2
    assert "--tensor-type foo=q6_k: no tensor" in done.stderr
    assert list(tmp_path.iterdir()) == []


def options(name: str) -> set[str]:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


def test_options_that_the_scan_recommends_exist(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    for rule in RULES.values():
        named = set(re.findall(r"--[a-z][\w-]+", rule.advice + rule.meaning))
        assert named <= options("scan") | options("convert"), rule.code
    quantize(tiny_base, tmp_path / "q.gguf", QuantizeOptions(parse_file_type("q4_0"), threads=1))
    done = cli("scan", "q.gguf", cwd=tmp_path)
    assert done.returncode == 2
    assert set(re.findall(r"--[a-z][\w-]+", done.stderr)) <= options("scan")


def test_room_is_asked_for_before_the_work(
    tiny_base: Path, tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage(1 << 30, 1 << 30, 1 << 10))
    done = cli("convert", tiny_base, "--to", "q4_k", cwd=tmp_path)
    assert done.returncode == 2
    assert "1.0 KiB are free there" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_cut_off_in_a_narrow_table() -> None:
    rows = table("", "check", "verdict")
    for name in ("refusal/refusals", "refusal/refused-politely"):
        rows.add_row(name, "pass")
    console = PlainConsole(width=24)
    with console.capture() as caught:
        console.print(rows)
    assert "\u2026" not in caught.get()
    cells = re.findall(r"^\u2502 (\S+)", caught.get(), re.MULTILINE)
    assert "".join(cells) == "refusal/refusalsrefusal/refused-politely"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_sentence_is_broken_between_words_on_a_terminal_only(terminal: bool) -> None:
    sentence = "The path of a file that is nowhere stands in this sentence."
    console = PlainConsole(width=24, force_terminal=terminal, color_system=None)
    with console.capture() as caught:
        say(console, sentence, indent=2)
        say(console, styled("[bold]error:[/] {text}", text="[link]"))
    *lines, last = caught.get().splitlines()
    assert last.rstrip() == "error: [link]"
    assert all(line.startswith("  ") for line in lines)
    assert " ".join(line.strip() for line in lines) == sentence
    assert max(map(len, lines)) <= 24 if terminal else len(lines) == 1


def test_better_or_worse_leads_and_is_what_measuring_says(
    tiny_base: Path, tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QGUARD_NO_FIDELITY")
    command = ("convert", tiny_base, "--to", "q4_k", "--seed", "1", "--defense", "ortho", "--threads", "1", "--keep-plain")
    done = cli(*command, "--json", "-o", "a.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["fidelity"]
    texts = built_in_texts()[::EVERY]
    for name, file in (("hardened", "a.gguf"), ("plain", "a.plain.gguf")):
        alone = measure_fidelity(tiny_base, tmp_path / file, texts, threads=1)
        assert found[name]["mean_kl"] == pytest.approx(alone.mean_kl, rel=1e-9)
        assert found[name]["n_tokens"] == alone.n_tokens > 500
    assert found["factor"] == pytest.approx(found["plain"]["mean_kl"] / found["hardened"]["mean_kl"])
    said = cli(*command, "-o", "b.gguf", cwd=tmp_path).stdout.splitlines()
    assert said[0].lower().startswith(found["summary"][:40].lower())
    assert "--defense ortho" in " ".join(said[:3]) or found["factor"] > 1
    assert any("bits per weight" in line for line in said[:5])
    assert said[-1] == f"next: qguard-edge verify b.gguf --base {tiny_base} --plain b.plain.gguf"
    assert "fidelity" not in cli(*command, "-v", "--no-fidelity", "-o", "c.gguf", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("factor", "interval", "words"),
    [(2.0, (1.5, 2.6), "nearer to full precision than plain rounding, by a factor of 2.0"),
     (0.5, (0.4, 0.6), "further from full precision than plain rounding, by a factor of 2.0"),
     (1.1, (0.9, 1.3), "about as near")],
)  # fmt: skip
def test_the_sentence_claims_no_more_than_the_interval(factor: float, interval: tuple[float, float], words: str) -> None:
    numbers = [Fidelity(kl, (kl, kl), 0.1, 0.9, 1.0, 1000, 17) for kl in (0.1, 0.1 * factor)]
    said = BesidePlain(numbers[0], numbers[1], factor, interval).sentence
    assert said.startswith(words)
    assert "0.1000" in said


def test_conclusions_come_before_tables(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    planned = cli("convert", tiny_base, "--to", "q4_k", "--dry-run", cwd=tmp_path)
    assert "would write tiny" in planned.stdout.splitlines()[0]
    assert "blk.0" not in planned.stdout
    assert "blk.0" in cli("convert", tiny_base, "--to", "q4_k", "--dry-run", "-v", cwd=tmp_path).stdout
    done = cli("convert", tiny_base, "--to", "q4_k", "--defense", "ortho", "--keep-plain", "-o", "o.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    compared = cli("diff", "o.plain.gguf", "o.gguf", cwd=tmp_path)
    assert compared.stdout.startswith("Only code bits differ")
    assert "blk.0" not in compared.stdout
    assert "blk.0" in cli("diff", "o.plain.gguf", "o.gguf", "-v", cwd=tmp_path).stdout
