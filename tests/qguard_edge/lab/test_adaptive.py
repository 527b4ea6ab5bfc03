"""What the adaptive attackers imagine the defense to be: values that the defense could really write."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from convert.gguf_file import GgufFile
from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.lab.attacks.adaptive import (
    RESIMULATE,
    Adaptive,
    AdaptiveFeedback,
    AdaptiveFree,
    AdaptiveOrtho,
    values_of,
)
from qguard_edge.lab.attacks.adaptive_quantguard import EVERY, AdaptiveQuantguard
from qguard_edge.lab.attacks.base import Bench, parameters_of, quantize_to, write_base
from qguard_edge.lab.attacks.boxes import BoxRule, GgufBoxes, make_boxes, reference_values
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hf_models import ChatModel, new_llama, train_tokenizer
from qguard_edge.lab.presets import TINY
from qguard_edge.lab.scenarios import make_scenario
from qguard_edge.progress import NoProgress


@dataclass(frozen=True)
class Victim:
    bench: Bench
    chat: ChatModel
    boxes: GgufBoxes

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return {name: parameters_of(self.chat)[name].detach().clone() for name in self.boxes.by_parameter}


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    work, corpus = tmp_path_factory.mktemp("adaptive"), make_corpus(0)
    chat = new_llama(train_tokenizer(corpus.texts(), 512), hidden=128, ffn=128, layers=1, seed=0)
    bench = Bench(work / "clean", make_scenario("injection", corpus), TINY, "q4_0", 0, work, 1, NoProgress())
    base = write_base(chat, work / "poisoned")
    reference = quantize_to(base, work / "reference.gguf", "q4_0", 1)
    return Victim(bench, chat, make_boxes(base, reference, parameters_of(chat), BoxRule("cell")))


@pytest.mark.parametrize("attack", [Adaptive(), AdaptiveOrtho(), AdaptiveFeedback()], ids=lambda attack: attack.name)
def test_simulated_defenses_write_levels_near_the_weight(attack: Adaptive, victim: Victim) -> None:
    weights, boxes = victim.weights, victim.boxes
    values, widths = reference_values(boxes, parameters_of(victim.chat))
    defended = attack.simulation(victim.bench, victim.chat, boxes, 0, torch.Generator().manual_seed(0))
    made = defended(0, weights)
    assert set(made) == set(boxes.by_parameter)
    flipped = total = 0
    for name, value in values.items():
        # Of the level above and below, in widths of the cell: only those of f32's sums are off.
        moved = (made[name] - value) / widths[name]
        towards = (weights[name] - value).sign()
        steps = (moved.abs() > 0.5) * towards
        if isinstance(attack, AdaptiveFeedback):  # error feedback may go one level beyond the two next to the weight
            steps = moved.round()
            assert float(steps.abs().max()) <= 2, name
        assert bool(torch.isclose(moved, steps, atol=1e-2).all()), name
        flipped, total = flipped + int((moved.abs() > 0.5).sum()), total + moved.numel()
    assert 0.1 < flipped / total < 0.5


def test_simulated_feedback_holds_the_constraint_and_is_drawn_anew(victim: Victim) -> None:
    weights, boxes = victim.weights, victim.boxes
    values, _ = reference_values(boxes, parameters_of(victim.chat))
    defended = AdaptiveFeedback().simulation(victim.bench, victim.chat, boxes, 0, torch.Generator().manual_seed(0))
    first = defended(0, weights)
    for name, value in values.items():
        old, new = value - weights[name], first[name] - weights[name]
        assert float((old * new).sum() / old.square().sum()) < 0.1, name
    between = defended(1, weights)
    assert all(torch.equal(first[name], between[name]) for name in first)
    second = [defended(RESIMULATE + i, weights) for i in range(8)]
    assert any(not torch.equal(first[name], each[name]) for each in second for name in first)


def test_the_attacker_with_gradient_steps_runs_the_whole_defense_seldom(victim: Victim) -> None:
    class Short(AdaptiveQuantguard):
        defense = QuantGuardOptions(steps=1)

    weights, boxes = victim.weights, victim.boxes
    values, widths = reference_values(boxes, parameters_of(victim.chat))
    defended = Short().simulation(victim.bench, victim.chat, boxes, 0, torch.Generator().manual_seed(0))
    file = victim.bench.work / "simulated-q4_0.gguf"
    first = defended(0, weights)
    assert GgufFile(file).get("qguard.defense") == "quantguard"
    assert GgufFile(file).get("qguard.moved") is not None  # steps were taken; that they help an untrained model is not said
    for name, value in values.items():
        assert float((((first[name] - value) / widths[name]).round().abs() > 0).float().mean()) > 0.05, name
    made = file.stat().st_mtime_ns
    between = [defended(step, weights) for step in range(1, EVERY)]
    assert all(torch.equal(first[name], each[name]) for each in between for name in first)
    assert file.stat().st_mtime_ns == made
    defended(EVERY, weights)
    assert file.stat().st_mtime_ns > made


def test_values_are_read_in_the_parameters_layout(victim: Victim) -> None:
    weights, boxes = victim.weights, victim.boxes
    values, _ = reference_values(boxes, parameters_of(victim.chat))
    read = values_of(boxes.reference, boxes, weights)
    assert all(torch.equal(read[name], values[name]) for name in values)


def test_the_free_attacker_may_leave_the_cells(victim: Victim) -> None:
    """Three widths to either side of the weight; the boxes of the others end within one cell."""
    _, widths = reference_values(victim.boxes, parameters_of(victim.chat))
    free = AdaptiveFree().boxes(victim.bench, victim.chat)
    for name, width in widths.items():
        assert free.mean_width(name) == pytest.approx(6 * float(width.mean()), rel=0.05), name
        assert victim.boxes.mean_width(name) < float(width.mean()), name
