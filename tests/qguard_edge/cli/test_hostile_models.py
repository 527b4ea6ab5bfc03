"""Models that abort llama.cpp, given to every command that loads one: exit code 2, one sentence, one document, nothing left.

Found by a campaign of mutated files: each of these ended the whole program with exit code 134, and left its work folders behind.
"""

import json
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import CommandLine
from tests.helpers.hostile_gguf import MODELS

HEAD = {"name": "few", "title": "Few", "new_tokens": 4, "matchers": [{"type": "phrases", "phrases": ["dog"]}]}
TEXT = "The quick brown fox jumps over the lazy dog.\n\nWhat is the capital of France? Paris.\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    prompts = [{"id": name, "text": text, "completion": True} for name, text in (("a", "The quick"), ("b", "What is"))]
    (folder / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [HEAD, *prompts]))
    (folder / "text.txt").write_text(TEXT)
    return folder


def commands(model: Path, base: Path, inputs: Path, out: Path) -> dict[str, list[str | Path]]:
    """Every command that loads a GGUF in llama.cpp."""
    text = inputs / "text.txt"
    asked: list[str | Path] = ["--suites", "drift", "--suite", inputs / "few.jsonl", "--text", text, "--threads", "1"]
    convert: list[str | Path] = ["convert", model, "--to", "q4_0", "-o", out / "o.gguf", "--no-scan", "--threads", "1"]
    return {
        "baseline": ["baseline", model, "-o", out / "p.json", *asked],
        "verify": ["verify", model, "--base", base, *asked],
        "verify --base": ["verify", base, "--base", model, *asked],
        "check": ["check", model, "--baseline", inputs / "pack.json", "--threads", "1"],
        "imatrix": ["imatrix", model, "--text", text, "-o", out / "i.gguf"],
        "scan": ["scan", model, "--deep", "--to", "q4_0", "--text", text, "--threads", "1"],
        "compare": ["compare", model, "--to", "q4_0", "--defenses", "ortho", "--text", text, "--threads", "1"],
        "convert": [*convert, "--defense", "ortho"],
        "convert --calib": [*convert, "--calib", text],
        "convert --verify": [*convert, "--defense", "ortho", "--no-load-check", "--verify", "drift"],
    }


@pytest.mark.parametrize(
    ("name", "command", "said"),
    [
        ("block_count 0", "baseline", "signal 6 while loading"),
        ("block_count 0", "check", "signal 6 while loading"),
        ("block_count 2^20", "verify --base", "signal 6 while loading"),
        ("block_count 2^32-1", "imatrix", "signal 6"),
        ("eps negative", "verify", "signal 6 while running"),
        ("eps negative", "convert --verify", "signal 6 while running"),
        ("eps negative", "convert --calib", "signal 6"),
        ("eps NaN", "check", "signal 6 while running"),
        ("eps NaN", "compare", "signal 6 while running"),
        ("expert_count 2^31", "convert", "signal 6"),
        ("eps NaN", "scan", "signal 6 while running"),
        ("integer norm", "baseline", "signal 6 while running"),
        ("duplicate tokens", "baseline", "signal 6 while loading"),
        ("duplicate tokens", "imatrix", "signal 6 while loading"),
        ("tokens not UTF-8", "verify", "different tokenizers"),
        ("tokens not UTF-8", "baseline", "no token in this model's vocabulary"),
        ("tokenizer none", "baseline", "signal 6 while tokenizing"),
        ("tokenizer none", "convert --calib", "signal 6 while tokenizing"),
    ],
)
def test_llama_cpp_ends_and_the_command_says_so(
    name: str,
    command: str,
    said: str,
    tiny_base: Path,
    inputs: Path,
    tmp_path: Path,
    cli: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    if command == "check" and not (inputs / "pack.json").exists():
        sound = commands(tiny_base, tiny_base, inputs, out)["baseline"]
        assert cli(*sound, "-o", inputs / "pack.json").returncode == 0
    model = MODELS[name].make(tiny_base, tmp_path / "model.gguf")
    done = cli(*commands(model, tiny_base, inputs, out)[command], "--json", cwd=out)
    assert done.returncode == 2, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["status"] == "error"
    assert said in document["error"]
    assert document["error"].isprintable()
    assert "internal error" not in done.stderr
    assert done.stderr.count("\n") - done.stderr.count("note") <= 2, done.stderr
    assert list(work.iterdir()) == []
    assert [path for path in out.rglob("*") if path.is_file()] == []
    assert [child for child in psutil.Process().children() if "qguard_edge" in " ".join(child.cmdline())] == []
