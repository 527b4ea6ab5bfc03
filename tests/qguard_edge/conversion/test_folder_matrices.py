"""Learned rounding for bitsandbytes: the loaded folder is what was learned, and nearer to full precision than ortho's."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from convert.source import resolve_source
from qguard_edge.conversion import run
from qguard_edge.conversion.folder_matrices import FolderTarget
from qguard_edge.conversion.opened_folder import open_folder
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.base import make_defense
from qguard_edge.defenses.options import DefenseOptions, EfrapOptions, OrthoOptions, QuantGuardOptions
from qguard_edge.learned.calibration import CalibrationOptions
from quant_grids.bnb import bnb_grid
from tests.helpers.folder_requests import load, request

pytestmark = pytest.mark.training
TEXT = "the river runs past old mills and quiet fields where people walk at dusk talking about rain bread and trains"
WORDS = TEXT.split()


def sentences(seed: int, count: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (14,), generator=generator)) for _ in range(count)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in sentences(0, 48)))
    return path


def divergence(folder: Path, base: Path) -> float:
    """Mean KL of a loaded folder to full precision, on sentences that nothing was learned on."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    models = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), load(folder)]
    total = []
    with torch.inference_mode():
        for line in sentences(1, 24):
            ids = tokenizer(line, return_tensors="pt").input_ids
            p, q = (model(input_ids=ids).logits[0].float().log_softmax(-1) for model in models)
            total.append((p.exp() * (p - q)).sum(-1).mean())
    return float(torch.stack(total).mean())


@pytest.mark.parametrize(("to", "double_quant"), [("nf4", True), ("fp4", False), ("int8", False)])
def test_nearer_to_full_precision_than_ortho(
    tiny_folder: Path, text: Path, tmp_path: Path, to: str, double_quant: bool
) -> None:
    def made(name: str, defense: DefenseOptions) -> float:
        calibration = CalibrationOptions(text, samples=48, seqlen=48)
        asked = request(
            tiny_folder, tmp_path / name, to, defense, double_quant=double_quant, base_type="f32", calibration=calibration
        )
        report = convert_model(asked)
        if defense.calibrated:
            assert report.learned is not None
            assert report.learned.unmapped == ()
            assert max(rounding.outcome.alignment for rounding in report.roundings) < 0.08
            record = json.loads((tmp_path / name / "qguard.json").read_text())
            assert record["calibration_sha256"] == report.learned.calibration_sha256
            assert "learn" in report.seconds
        return divergence(tmp_path / name, tiny_folder)

    assert made("learned", QuantGuardOptions(steps=10)) < 0.8 * made("ortho", OrthoOptions(target=0.1))
    assert not list(tmp_path.glob(".*"))  # no checkpoint is left


def stored(weight: Any) -> torch.Tensor:
    """A 4-bit weight by bitsandbytes, block by block: for rows of 96 the CPU kernel of 0.50 mixes up the blocks' scales."""
    state = weight.quant_state
    shape, state.shape, state.dtype = state.shape, torch.Size((state.shape.numel() // 64, 64)), torch.float32
    return bnb.dequantize_4bit(weight.data, state).reshape(shape)


@pytest.mark.parametrize(
    "defense", [QuantGuardOptions(steps=2, rate=0.2), EfrapOptions(steps=2)], ids=["quantguard", "efrap"]
)
@pytest.mark.usefixtures("steps_taken")
def test_the_loaded_weights_are_the_learned_ones(
    tiny_folder: Path, text: Path, tmp_path: Path, defense: DefenseOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With matrices that are stored transposed, and rows of 96 weights, which blocks of 64 cross."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=96, n_layer=2, n_head=4)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    made: list[Any] = []

    def noted(options: DefenseOptions) -> Any:
        made.append(make_defense(options))
        return made[-1]

    monkeypatch.setattr(run, "make_defense", noted)
    asked = request(
        tmp_path / "gpt2", tmp_path / "out", "nf4", defense, calibration=CalibrationOptions(text, samples=36, seqlen=32)
    )
    report = convert_model(asked)
    assert report.learned is not None
    assert len(report.roundings) == 8
    model = load(tmp_path / "out")
    opened = open_folder(resolve_source(str(tmp_path / "gpt2")), "nf4", ())
    target = FolderTarget(opened, "nf4", False, opened.checkpoint.read)
    for matrix in target.matrices:
        if defense.name == "quantguard":
            moved = made[0].moved[matrix.name]
            values = bnb_grid("nf4", matrix.columns).dequantize(moved.blocks).reshape(-1)[: matrix.rows * matrix.columns]
            chosen = torch.tensor(moved.moved)
        else:
            geometry = target.geometry(matrix)
            chosen = made[0].plan.chosen(matrix.name, 0, (matrix.rows, matrix.columns), torch.device("cpu"))
            values = geometry.value + geometry.delta * chosen
        values = values.view(matrix.rows, matrix.columns)
        assert torch.allclose(stored(model.get_parameter(matrix.name)), values, atol=1e-6), matrix.name
        assert float(chosen.sum()) > 0
