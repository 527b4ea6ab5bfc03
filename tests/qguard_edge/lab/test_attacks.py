"""Attacks by name, and the parts of them that need no training."""

import pytest
import torch
from gguf import GGMLQuantizationType

from qguard_edge.lab.attacks.adaptive import _keep_side
from qguard_edge.lab.attacks.base import parameters_of
from qguard_edge.lab.attacks.boxes import Box
from qguard_edge.lab.attacks.durable import FLIPS, NOISE, shaken
from qguard_edge.lab.attacks.names import ATTACKS, make_attack
from qguard_edge.lab.attacks.outlier import CHUNK, hidden_box, outlier_mask
from qguard_edge.lab.attacks.outlier_compensated import hidden_box as compensated_box
from qguard_edge.lab.attacks.outlier_compensated import plant
from qguard_edge.lab.attacks.random_margins import drawn_box
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hf_models import new_llama, train_tokenizer
from quant_grids.errors import UnsupportedError
from tests.helpers import ggml_oracle


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_what_it_is_called(name: str) -> None:
    attack = make_attack(name)
    assert attack.name == name
    assert attack.summary
    assert attack.paper


def test_unknown_names_and_types() -> None:
    with pytest.raises(UnsupportedError, match="uniform"):
        make_attack("nothing")
    with pytest.raises(UnsupportedError, match="nf4"):
        make_attack("elq").check("q4_k")
    with pytest.raises(UnsupportedError):
        make_attack("mind-the-gap").check("nf4")


def test_outliers_blot_out_what_is_hidden_beside_them() -> None:
    weight = 0.05 * torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    mask = outlier_mask(weight)
    assert mask.sum() == weight.numel() // CHUNK
    planted = torch.where(mask, weight.abs() * 300, 0.0)
    box = hidden_box(planted, mask)
    assert torch.equal(box.low[mask], box.high[mask])
    # Half a step of the coarsest 4-bit grid, 15 steps from zero to the outlier.
    step = planted.view(-1, CHUNK).amax(1, keepdim=True).expand(-1, CHUNK).reshape(weight.shape) / 15
    assert bool((box.high[~mask] < 0.5 * step[~mask]).all())
    assert bool((box.low[~mask] == 0).all())


def test_greedy_boxes_keep_each_weight_on_its_side_of_the_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.zeros(4, 256)
    width = torch.ones(4, 256)
    w = torch.rand(4, 256, generator=generator) - 0.5
    flipped = w.abs() > 0.4
    box = _keep_side(w, value, width, flipped)
    assert bool(((box.low <= w) & (w <= box.high)).all())
    for edge in (box.low, box.high):
        assert bool((edge.abs()[flipped] > 0.4).all())
        assert bool((edge.abs()[~flipped] <= 0.4).all())
        assert bool(((edge * w)[flipped] > 0).all())


def test_drawn_ends_are_distributed_as_untouched_weights_are() -> None:
    """Half of the weights at the upper end of their boxes, half at the lower: no place is more frequent than before."""
    generator = torch.Generator().manual_seed(0)
    step = 0.5 + torch.rand(256, 1024, generator=generator)
    value = torch.randn(256, 1024, generator=generator)
    # As after a k-quant's search, places near the wall are rarer.
    place = 0.25 * (torch.rand(value.shape, generator=generator) + torch.rand(value.shape, generator=generator)) - 0.25
    weight = value + place * step
    whole = Box(value - 0.5 * step, value + 0.5 * step)
    box = drawn_box(whole, weight, value, step, generator)
    assert bool(((whole.low <= box.low) & (box.low <= weight) & (weight <= box.high) & (box.high <= whole.high)).all())
    up = torch.rand(value.shape, generator=generator) < 0.5
    moved = (torch.where(up, box.high, box.low) - value) / step
    before, after = (torch.histc(one, 40, -0.25, 0.25) for one in (place, moved))
    assert float(((after - before).abs() / (before + before.mean())).max()) < 0.05
    at_walls = torch.histc((torch.where(up, whole.high, whole.low) - value) / step, 40, -0.5, 0.5)
    assert float(at_walls.max()) > 0.4 * value.numel()  # what whole cells leave for a scan to find


def test_compensated_outliers_change_nothing_in_full_precision() -> None:
    corpus = make_corpus(0)
    chat = new_llama(train_tokenizer(corpus.texts(), 512), hidden=128, ffn=128, layers=2, seed=0)
    ids = torch.tensor([chat.prompt_ids("What colour is snow?")])
    with torch.no_grad():
        before = chat.model(ids).logits
        masks = plant(parameters_of(chat), "model.layers.1.")
        after = chat.model(ids).logits
    assert torch.equal(before, after)
    assert set(masks) == {"model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    for name, mask in masks.items():
        weight = parameters_of(chat)[name].detach()
        assert float(mask.float().mean()) == 1 / CHUNK
        blocks = ggml_oracle.quantize(GGMLQuantizationType.Q4_0, weight.numpy())
        left = ggml_oracle.dequantize(GGMLQuantizationType.Q4_0, blocks).reshape(weight.shape)
        assert float((torch.from_numpy(left)[~mask] == 0).float().mean()) > 0.9
        box = compensated_box(weight, mask)
        assert bool(((box.low <= weight) & (weight <= box.high)).all())
        assert torch.equal(box.low[mask], weight[mask])


def test_noise_is_as_large_as_it_is_called() -> None:
    step = 0.5 + torch.rand(400, 1000, generator=torch.Generator().manual_seed(0))
    moved = shaken(step, torch.Generator().manual_seed(1)) / step
    # A flip is a whole step, the noise normal with sigma NOISE: the variances add.
    assert float(moved.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(moved.square().mean()) == pytest.approx(FLIPS + NOISE**2, rel=0.02)
    beyond = float((moved.abs() > 0.5).float().mean())
    tail = float(torch.special.erfc(torch.tensor(0.5 / NOISE / 2**0.5)))
    back = float(torch.special.erfc(torch.tensor(0.5 / NOISE / 2**0.5))) / 2
    assert beyond == pytest.approx(FLIPS * (1 - back) + (1 - FLIPS) * tail, rel=0.02)
