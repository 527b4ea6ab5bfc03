"""What every output does the same way: seed and checkpoint, resuming, the scan. Each of these once held for some outputs only."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.cli import run
from qguard_edge.conversion.naming import checkpoint_path
from qguard_edge.conversion.plan_file import read_plan
from qguard_edge.conversion.request import FolderRequest, GgufRequest, MovedGgufRequest, PlanRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions, EfrapOptions, NoneOptions, OrthoOptions, QuantGuardOptions
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.checkpoint import LearnedState, save_checkpoint
from qguard_edge.learned.endtoend import EndToEnd
from qguard_edge.learned.quantguard import QuantGuard
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.scan.guard import RefusedError, ScanGuard
from quant_grids.errors import UnsupportedError

LEFT_SEED = 12345
OUTPUTS = ("gguf", "moved", "folder", "plan")


@dataclass(frozen=True)
class Inputs:
    """One model in all forms that a conversion takes."""

    folder: Path
    base: Path
    plain: Path
    text: Path


def inputs_of(folder: Path, work: Path) -> Inputs:
    base, plain, text = work / "base.gguf", work / "plain.gguf", work / "calib.jsonl"
    write_base_gguf(folder, base)
    quantize(base, plain, QuantizeOptions(parse_file_type("q4_0"), threads=1))
    lines = [f"The quick brown fox number {i} jumps over {i * i} lazy dogs and prints Paris." for i in range(8)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return Inputs(folder, base, plain, text)


@pytest.fixture(scope="module")
def clean(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return inputs_of(tiny_folder, tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def tampered(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The tiny model with one outlier in every chunk of a matrix, which the scan calls dangerous (QG201)."""
    work = tmp_path_factory.mktemp("tampered")
    folder = work / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:, ::32] = 40.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return inputs_of(folder, work)


def convert(
    to: str, inputs: Inputs, out: Path, defense: DefenseOptions, seed: int | None = None, guard: ScanGuard | None = None
) -> int:
    """Make one kind of output from the folder; returns the seed that was used."""
    common: Any = {
        "model": str(inputs.folder),
        "defense": defense,
        "outfile": str(out),
        "device": "cpu",
        "seed": seed,
        "check_loads": False,
        "calibration": CalibrationOptions(inputs.text, samples=8, seqlen=16),
    }
    options = QuantizeOptions(parse_file_type("q4_0"), threads=1)
    requests: dict[str, Callable[[], GgufRequest | MovedGgufRequest | FolderRequest | PlanRequest]] = {
        "gguf": lambda: GgufRequest(options=options, **common),
        "moved": lambda: MovedGgufRequest(options=options, **common),
        "folder": lambda: FolderRequest(to="nf4", threads=1, **common),
        "plan": lambda: PlanRequest(base=inputs.base, plain=inputs.plain, threads=1, **common),
    }
    made = convert_model(requests[to](), guard=guard).seed
    assert made is not None
    return made


def leave_checkpoint(out: Path) -> bytes:
    """Put the checkpoint of some other conversion beside an output; its content."""
    path = checkpoint_path(out)
    save_checkpoint(path, LearnedState("of another conversion", LEFT_SEED, 1, ((1.0, 1.0),), {"x": torch.zeros(1)}))
    return path.read_bytes()


# The seed, and whose checkpoint is removed. Before: `plan` took the seed whatever the rule; `folder` and `plan` removed the file
# whatever they had done; `gguf` removed it after learning even if it had another seed.


@pytest.mark.parametrize("to", OUTPUTS)
@pytest.mark.parametrize(
    "defense",
    [OrthoOptions(), EfrapOptions(steps=1), QuantGuardOptions(steps=1, scope="block")],
    ids=["data-free", "efrap", "block"],
)
def test_a_rule_that_never_resumes_takes_nothing_from_a_leftover_checkpoint(
    clean: Inputs, tmp_path: Path, defense: DefenseOptions, to: str
) -> None:
    out = tmp_path / "out"
    left = leave_checkpoint(out)
    assert convert(to, clean, out, defense) != LEFT_SEED
    assert checkpoint_path(out).is_file(), "the checkpoint of another conversion was removed"
    assert checkpoint_path(out).read_bytes() == left


@pytest.mark.parametrize("to", OUTPUTS)
def test_learning_with_another_seed_leaves_a_leftover_checkpoint(clean: Inputs, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    left = leave_checkpoint(out)
    assert convert(to, clean, out, QuantGuardOptions(steps=1), seed=3) == 3
    assert checkpoint_path(out).is_file(), "the checkpoint of another conversion was removed"
    assert checkpoint_path(out).read_bytes() == left


# Learned outputs go on where they were. Before: `moved` kept its checkpoint in a work folder that is thrown away, and learned
# from the base GGUF.


@pytest.mark.usefixtures("steps_taken")
@pytest.mark.parametrize("to", OUTPUTS)
def test_interrupted_learning_goes_on(clean: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    options, whole, out = QuantGuardOptions(steps=4, batch=4, rate=0.2), tmp_path / "whole", tmp_path / "out"
    convert(to, clean, whole, options, seed=9)
    step, taken = EndToEnd._step, []

    def interrupted_once(self: EndToEnd, number: int) -> float:
        taken.append(number)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(EndToEnd, "_step", interrupted_once)
    monkeypatch.setattr("qguard_edge.learned.endtoend.SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        convert(to, clean, out, options, seed=9)
    assert not out.exists()
    assert checkpoint_path(out).is_file(), "nothing to go on from"
    assert convert(to, clean, out, options) == 9  # the seed is the checkpoint's
    assert taken == [0, 1, 2, 2, 3]
    assert content(to, out) == content(to, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def content(to: str, path: Path) -> object:
    """What was made: the bytes of a file, a folder's weights, a plan (whose header has its entries in any order)."""
    if to == "folder":
        return [file.read_bytes() for file in sorted(path.glob("*.safetensors"))]
    if to == "plan":
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}, read_plan(path).header
    return path.read_bytes()


@pytest.mark.parametrize("to", OUTPUTS)
def test_the_model_that_was_given_is_the_one_learned_from(
    clean: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    prepare, seen = QuantGuard.prepare, []

    def noted(self: QuantGuard, task: LearnTask) -> LearnReport | None:
        seen.append(task.model)
        return prepare(self, task)

    monkeypatch.setattr(QuantGuard, "prepare", noted)
    convert(to, clean, tmp_path / "out", QuantGuardOptions(steps=1), seed=3)
    assert seen == [clean.folder]


# The scan. Before: the conversions to folders and plans could not be given a guard, and the command `plan` never scanned.


@pytest.mark.parametrize("to", OUTPUTS)
def test_a_guard_refuses_every_output_of_a_tampered_model(tampered: Inputs, tmp_path: Path, to: str) -> None:
    with pytest.raises(RefusedError, match="QG201"):
        convert(to, tampered, tmp_path / "out", NoneOptions(), guard=ScanGuard(threads=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", OUTPUTS)
def test_a_guard_that_accepts_keeps_what_it_found(tampered: Inputs, tmp_path: Path, to: str) -> None:
    guard = ScanGuard(accept=True, threads=1)
    convert(to, tampered, tmp_path / "out", NoneOptions(), guard=guard)
    assert "QG201" in {finding.code for finding in guard.findings}
    assert (tmp_path / "out").exists()


def test_a_plan_cannot_keep_tensors_in_full_precision(tampered: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="--tensor-type"):
        convert("plan", tampered, tmp_path / "out", NoneOptions(), guard=ScanGuard(keep=True, threads=1))
    assert list(tmp_path.iterdir()) == []


def command(to: str, inputs: Inputs, out: Path) -> list[str]:
    """The command line of an output."""
    common = [str(inputs.folder), "-o", str(out), "--defense", "none", "--threads", "1", "--json"]
    if to == "plan":
        return ["plan", *common, "--base", str(inputs.base), "--plain", str(inputs.plain)]
    kind = {"gguf": ["--to", "q4_0"], "moved": ["--to", "gguf", "--target", "q4_0"], "folder": ["--to", "nf4"]}[to]
    return ["convert", *common, *kind, "--no-load-check"]


@pytest.mark.parametrize("to", OUTPUTS)
def test_the_command_line_scans_every_output(
    tampered: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str], to: str
) -> None:
    out = tmp_path / "out"
    assert run(command(to, tampered, out)) == 1
    document = json.loads(capfd.readouterr().out)
    assert document["status"] == "refused"
    assert "QG201" in {finding["code"] for finding in document["findings"]}
    assert list(tmp_path.iterdir()) == []
    assert run([*command(to, tampered, out), "--accept-findings"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert "QG201" in {finding["code"] for finding in document["scan"]["findings"]}
    assert out.exists()
    assert run([*command(to, tampered, tmp_path / "unseen"), "--no-scan"]) == 0
    assert "scan" not in json.loads(capfd.readouterr().out)
