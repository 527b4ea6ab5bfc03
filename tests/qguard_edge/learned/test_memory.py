"""Estimates of learning's memory and time, and what `--max-memory` makes of them."""

import json
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from convert.gguf_file import GgufModel
from qguard_edge.cli import app
from qguard_edge.defenses.options import EfrapOptions, FeedbackOptions, OrthoOptions, QuantGuardOptions
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.memory import (
    MemoryLimitError,
    ModelSize,
    available_bytes,
    bytes_needed,
    fit,
    parse_size,
    seconds_needed,
    size_of,
    size_of_gguf,
)
from tests.helpers.command import CommandLine, program

# A Llama of 8 billion parameters with untied embeddings.
LARGE = ModelSize(8_030_000_000, 218_000_000, 32, 128_256, 4096)
TEXT = CalibrationOptions(samples=128, seqlen=256)
CPU = torch.device("cpu")


def test_a_gguf_and_a_checkpoint_have_the_same_size() -> None:
    gguf: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (64, 1000)), ("blk.0.attn_q.weight", (64, 64))]
    gguf += [("blk.1.attn_q.weight", (64, 64))]
    gguf += [("blk.1.ffn_up.weight", (64, 128)), ("output_norm.weight", (64,))]
    checkpoint: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (1000, 64))]
    checkpoint += [("model.layers.0.self_attn.q_proj.weight", (64, 64))]
    checkpoint += [("model.layers.1.self_attn.q_proj.weight", (64, 64)), ("model.layers.1.mlp.up_proj.weight", (128, 64))]
    checkpoint += [("model.norm.weight", (64,))]
    expected = ModelSize(64_000 + 2 * 4096 + 8192 + 64, 4096 + 8192, 2, 1000, 64)
    assert size_of(gguf) == size_of(checkpoint) == expected


def test_the_first_that_fits_is_taken() -> None:
    asked = QuantGuardOptions()
    saving, blocks = replace(asked, checkpointing=True), replace(asked, scope="block")
    needs = [bytes_needed(LARGE, one, TEXT) for one in (asked, saving, blocks)]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > 34 * LARGE.weights
    assert needs[2] < 10 * LARGE.weights
    for limit, expected in ((needs[0], asked), (needs[0] - 1, saving), (needs[1] - 1, blocks)):
        chosen, note = fit(asked, LARGE, TEXT, limit)
        assert chosen == expected
        assert bool(note) == (chosen != asked)
    with pytest.raises(MemoryLimitError, match="even one block at a time"):
        fit(asked, LARGE, TEXT, needs[2] - 1)


def test_a_scope_that_was_asked_for_is_not_changed() -> None:
    for asked in (QuantGuardOptions(scope="block"), EfrapOptions()):
        need = bytes_needed(LARGE, asked, TEXT)
        assert fit(asked, LARGE, TEXT, need) == (asked, "")
        with pytest.raises(MemoryLimitError, match=f"--defense {asked.name}"):
            fit(asked, LARGE, TEXT, need - 1)
    assert bytes_needed(LARGE, OrthoOptions(), TEXT) == 0


@pytest.mark.parametrize(("text", "expected"), [("24GiB", 24 << 30), ("800 MB", 800_000_000), ("1000", 1000)])
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["lots", "", "0", "-3GiB", "3 parsecs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(MemoryLimitError, match="is no size"):
        parse_size(text)


def test_time_grows_with_steps_and_weights() -> None:
    small, large = ModelSize(10**8, 10**6, 30, 50_000, 512), ModelSize(10**9, 10**7, 30, 50_000, 512)
    few, many = QuantGuardOptions(steps=10), QuantGuardOptions(steps=200)
    found = [seconds_needed(size, options, TEXT, CPU) for size in (small, large) for options in (few, many)]
    assert all(one is not None and one > 0 for one in found)
    assert found[3] == max(found, key=float)  # type: ignore[arg-type]
    assert found[0] == min(found, key=float)  # type: ignore[arg-type]
    assert seconds_needed(small, EfrapOptions(), TEXT, CPU) is None


def test_time_grows_with_the_text_that_error_feedback_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qguard_edge.learned.memory.product_rate", lambda _device: 1e11)  # the same machine both times
    options = QuantGuardOptions(steps=0)
    short, long = (seconds_needed(LARGE, options, replace(TEXT, samples=count), CPU) for count in (32, 512))
    assert short is not None
    assert long is not None
    assert long > 2 * short
    drawing = seconds_needed(LARGE, options, TEXT, CPU)
    assert drawing is not None
    assert seconds_needed(LARGE, FeedbackOptions(), TEXT, CPU) == drawing
    assert bytes_needed(LARGE, FeedbackOptions(), TEXT) == bytes_needed(LARGE, options, TEXT)
    stepping = seconds_needed(LARGE, replace(options, steps=1), TEXT, CPU)
    assert stepping is not None
    assert stepping > drawing


def test_a_limit_makes_the_file_that_block_scope_makes(tiny_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    """In processes of their own: the limit counts what a process holds already."""
    size, text = size_of_gguf(GgufModel(tiny_base)), CalibrationOptions(samples=128, seqlen=32)
    whole = QuantGuardOptions(steps=2, batch=128)
    limit = bytes_needed(size, replace(whole, scope="block"), text)
    assert limit < bytes_needed(size, replace(whole, checkpointing=True), text)
    command = ["convert", str(tiny_folder), "--to", "q4_0", "--defense", "quantguard", "--quantguard-steps", "2"]
    command += [
        "--quantguard-batch",
        "128",
        "--calib-samples",
        "128",
        "--calib-seqlen",
        "32",
        "--seed",
        "3",
        "--threads",
        "1",
    ]
    command += ["--device", "cpu", "-o"]
    more = {"limited.gguf": ["--max-memory", str(limit)], "blocks.gguf": ["--quantguard-scope", "block"]}
    limited, expected = (
        subprocess.run(program(*command, tmp_path / name, *options), capture_output=True, text=True)
        for name, options in more.items()
    )
    assert limited.returncode == expected.returncode == 0, limited.stderr + expected.stderr
    assert (tmp_path / "limited.gguf").read_bytes() == (tmp_path / "blocks.gguf").read_bytes()
    assert "block by block" in " ".join((limited.stdout + limited.stderr).split())
    assert "block by block" not in " ".join((expected.stdout + expected.stderr).split())


def test_too_little_memory_is_one_sentence_and_no_file(tiny_folder: Path, tmp_path: Path, cli: CommandLine) -> None:
    command = ["convert", str(tiny_folder), "--to", "q4_0", "--defense", "quantguard", "-o", str(tmp_path / "out.gguf")]
    for extra in ([], ["--dry-run"]):
        done = cli(*command, "--max-memory", "100MB", *extra)
        assert done.returncode == 2
        assert "--max-memory allows 95.4 MiB" in " ".join(done.stderr.split())
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["q4_0", "nf4"])
def test_a_dry_run_says_what_learning_takes(tiny_folder: Path, to: str) -> None:
    command = ["convert", str(tiny_folder), "--to", to, "--dry-run", "--defense"]
    cost = json.loads(CliRunner().invoke(app, [*command, "quantguard", "--json"]).stdout)["learning"]
    assert cost["memory_bytes"] > 300 << 20
    assert cost["seconds"] > 0
    assert "learning takes about" in CliRunner().invoke(app, [*command, "quantguard", "-q"]).stdout
    assert json.loads(CliRunner().invoke(app, [*command, "ortho", "--json"]).stdout)["learning"] is None


def test_free_memory_is_known() -> None:
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert available_bytes(CPU) > resident
