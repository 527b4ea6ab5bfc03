"""Attacks by name, and the parts of them that need no training."""

import pytest
import torch

from qguard_edge.lab.attacks.adaptive import _keep_side
from qguard_edge.lab.attacks.names import ATTACKS, make_attack
from qguard_edge.lab.attacks.outlier import CHUNK, hidden_box, outlier_mask
from quant_grids.errors import UnsupportedError


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
