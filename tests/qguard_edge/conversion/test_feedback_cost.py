"""What a conversion by feedback is expected to take, against what one takes; and the limit on its memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.gguf_file import GgufModel
from qguard_edge.cli import app
from qguard_edge.conversion.feedback_cost import Model, RoundedMatrix, cost_of, inputs_of, matrices_of, model_of, reference
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.rounding.room import Room, RoomError, room_for
from tests.helpers.command import CommandLine

GIB, MIB = 1 << 30, 1 << 20
SAMPLER = Path(__file__).parents[3] / "scripts" / "bench" / "tree_memory.py"


def llama(layers: int, hidden: int, ffn: int, tokens: int = 32768) -> Model:
    """A Llama without grouped heads, its output matrix of its own."""
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden, hidden),
        "attn_v": (hidden, hidden),
        "attn_output": (hidden, hidden),
    }
    shapes |= {"ffn_gate": (hidden, ffn), "ffn_up": (hidden, ffn), "ffn_down": (ffn, hidden)}
    named: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (hidden, 32000)), ("output.weight", (hidden, 32000))]
    named += [(f"blk.{i}.{name}.weight", shape) for i in range(layers) for name, shape in shapes.items()]
    named += [(f"blk.{i}.attn_norm.weight", (hidden,)) for i in range(layers)]
    return Model(matrices_of(named), 1, 256, tokens)


def test_the_inputs_are_those_of_a_llama() -> None:
    found = inputs_of(llama(2, 64, 192))
    assert [work.columns for work in found] == [64, 64, 64, 192, 64, 64, 64, 192, 64]
    assert found[0].names == ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")
    assert found[0].before == 0
    # Everything but the output matrix is multiplied before the last input is there, attention counted as 2 * 256 * 64.
    assert found[-1].before == 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 256 * 64)
    tied = inputs_of(Model((RoundedMatrix("token_embd.weight", 64, 1000),), 1, 256, 1))
    assert [work.names for work in tied] == [("token_embd.weight",)]


def test_a_limit_means_more_passes_and_no_less_time() -> None:
    model, rates = llama(22, 2048, 5632), reference(2)
    free, tight = (cost_of(model, rates, limit=limit, parent=0, quantizer=0) for limit in (None, 2 * GIB))
    assert free.passes == 1
    assert free.disk_bytes == pytest.approx(4 * (22 * (3 * 2048**2 + 5632**2) + 2048**2), rel=1e-3)
    assert free.memory_bytes > free.disk_bytes
    assert tight.passes > 1
    assert tight.memory_bytes <= 2 * GIB
    assert tight.seconds["activations"] > 1.3 * free.seconds["activations"]
    assert tight.disk_bytes == free.disk_bytes


def test_time_follows_the_work() -> None:
    rates = reference(1)
    one, text, deep = (
        cost_of(model, rates, limit=None, parent=0, quantizer=0)
        for model in (llama(4, 1024, 3072), llama(4, 1024, 3072, 65536), llama(8, 1024, 3072))
    )
    assert text.seconds["activations"] == pytest.approx(2 * one.seconds["activations"], rel=0.05)
    assert text.seconds["choose and write"] == one.seconds["choose and write"]
    assert one.total < deep.total < 2.1 * one.total
    twice = cost_of(llama(4, 1024, 3072), reference(2), limit=None, parent=0, quantizer=0)
    assert 0.45 < twice.seconds["choose and write"] / one.seconds["choose and write"] < 0.75


def test_room_gives_up_speed_before_it_gives_up() -> None:
    assert room_for(4096, 8, None) == Room(8)
    full, least = Room(8).bytes_for(4096), Room(1, kept=1, ahead=False).bytes_for(4096)
    assert room_for(4096, 8, full) == Room(8)
    assert room_for(4096, 8, full - 1) == Room(8, kept=1)
    tight = room_for(4096, 8, least)
    assert (tight.kept, tight.ahead) == (1, False)
    assert tight.bytes_for(4096) <= least
    with pytest.raises(RoomError, match=r"raise --max-memory by 1 MiB"):
        room_for(4096, 8, least - 1)


def test_a_dry_run_predicts_each_stage(tiny_base: Path) -> None:
    command = ["convert", str(tiny_base), "--to", "q4_k", "--dry-run", "--threads", "1"]
    plan = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    cost = plan["prediction"]
    assert plan["learning"] is None
    assert plan["memory_bytes"] == cost["memory_bytes"] > 100 * MIB
    assert set(cost["seconds"]) == {"start", "scan", "activations", "plain", "choose and write", "check"}
    assert cost["total"] == pytest.approx(sum(cost["seconds"].values()))
    assert cost["passes"] == 1
    shown = CliRunner().invoke(app, command)  # the machine is measured once in a process
    assert "measured on this machine, threads: 1" in shown.stdout
    assert "takes about" in shown.stdout


def test_the_limit_holds_for_all_processes_together(tiny_base: Path, tmp_path: Path) -> None:
    limit = 420 * MIB
    command = [sys.executable, "-m", "qguard_edge", "convert", str(tiny_base), "--to", "q4_k", "--threads", "1", "-q"]
    command += ["--max-memory", str(limit), "--calib-samples", "16", "-o", str(tmp_path / "out.gguf")]
    done = subprocess.run([sys.executable, str(SAMPLER), *command], capture_output=True, text=True, check=False)
    peaks = json.loads(done.stderr.splitlines()[-1])
    assert done.returncode == peaks["exit"] == 0
    assert peaks["processes"] > 1
    assert 100 * MIB < peaks["anonymous"] < limit


def test_too_small_a_limit_is_one_sentence(tiny_base: Path, tmp_path: Path, cli: CommandLine) -> None:
    out = tmp_path / "out.gguf"
    for extra in ([], ["--dry-run"]):
        done = cli("convert", tiny_base, "--to", "q4_k", "--max-memory", "120MB", "-o", out, *extra)
        said = " ".join(done.stderr.split())
        assert done.returncode == 2
        assert "--max-memory 114.4 MiB is too little" in said
        assert "--defense ortho" in said
        assert list(tmp_path.iterdir()) == []


def test_what_is_expected_of_a_base_knows_its_experts(tiny_base: Path) -> None:
    model = model_of(GgufModel(tiny_base), CalibrationOptions(samples=4, seqlen=32))
    assert (model.used, model.tokens, model.seqlen) == (1, 128, 32)
    assert {matrix.name for matrix in model.matrices} >= {"token_embd.weight", "blk.0.ffn_down.weight"}
    mixture = Model(
        (RoundedMatrix("blk.0.ffn_up_exps.weight", 64, 8 * 96, 8), RoundedMatrix("output.weight", 64, 100)), 2, 1, 1
    )
    assert inputs_of(mixture)[-1].before == 2 * 64 * 96
