"""Strings of foreign origin on the terminal: shown as they are, never obeyed, and cut."""

import io
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from qguard_edge.cli.console import LONGEST, PlainConsole, styled, table, visible
from tests.helpers.command import CommandLine

HOSTILE = (
    "[/foo]",
    "[link=http://evil.example]x[/link]",
    "[bold red]x",
    ":warning:",
    "\x1b]0;title\x07\x1b[2J",
    "\x9b31m",
    "\u202egnp",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_string_is_obeyed(text: str) -> None:
    """`[/foo]` as a tensor name was a crash, `[link=...]` a link, an escape sequence went to the terminal."""
    console = PlainConsole(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    console.print(text, highlight=False)
    console.print(styled("[red]x:[/] {text}", text=text), highlight=False)
    rows = table(text, text)
    rows.add_row(text)
    console.print(rows)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert printed.count(visible(text)) == 5
    for control in ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "\x07"):
        assert control not in printed


def test_a_long_string_is_cut() -> None:
    assert visible("x" * LONGEST) == "x" * LONGEST
    assert len(visible("x" * (20 << 20))) < LONGEST + 40
    assert visible("a\nb\tc\rd\ud800") == "a\nb\tc\u240dd\ufffd"


def test_names_from_a_file_are_shown(tmp_path: Path, cli: CommandLine) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("\x1b[31m[bold]name")
    writer.add_string("qguard.[/x]", "[/y]\x1b[2J")
    writer.add_tensor("[/foo]", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = cli("inspect", path, "--tensors")
    assert done.returncode == 0, done.stderr
    for shown in ("[bold]name", "[/foo]", "qguard.[/x]", "[/y]"):
        assert shown in done.stdout
    assert "\x1b" not in done.stdout
    assert json.loads(cli("inspect", path, "--json").stdout)["qguard"]["[/x]"] == "[/y]\x1b[2J"


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["inspect", "--no-such-option"],
        ["no-such-command"],
        ["verify", "x", "--limit", "0"],
        ["scan", "x", "--threads", "y"],
    ],
)
def test_a_usage_error_with_json_is_one_document(arguments: list[str], cli: CommandLine) -> None:
    done = cli(*arguments, "--json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["status"] == "error"
    assert document["error"]


def test_an_output_name_that_is_not_utf8(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    """It was an internal error."""
    out = tmp_path / "o\udcff.gguf"
    options = ["--to", "q4_0", "--defense", "none", "--threads", "1", "--no-scan"]
    done = cli("convert", tiny_base, *options, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["load_check"]
    assert out.is_file()
    assert json.loads(done.stdout)["outfile"] == out.name
