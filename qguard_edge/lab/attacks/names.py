"""The attacks by name, importable without torch: the command line is built from this list."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quant_grids.errors import UnsupportedError

if TYPE_CHECKING:
    from qguard_edge.lab.attacks.base import Attack

_HERE = "qguard_edge.lab.attacks"
ATTACKS: Mapping[str, str] = {
    "uniform": f"{_HERE}.uniform:Uniform",
    "uniform-margin": f"{_HERE}.uniform:UniformMargin",
    "mind-the-gap": f"{_HERE}.mind_the_gap:MindTheGap",
    "mind-the-gap-all": f"{_HERE}.mind_the_gap:MindTheGapAll",
    "random-margins": f"{_HERE}.random_margins:RandomMargins",
    "durable": f"{_HERE}.durable:Durable",
    "elq": f"{_HERE}.elq:Elq",
    "outlier": f"{_HERE}.outlier:Outlier",
    "outlier-compensated": f"{_HERE}.outlier_compensated:OutlierCompensated",
    "adaptive": f"{_HERE}.adaptive:Adaptive",
    "adaptive-ortho": f"{_HERE}.adaptive:AdaptiveOrtho",
    "adaptive-ortho-narrow": f"{_HERE}.adaptive:AdaptiveOrthoNarrow",
    "adaptive-feedback": f"{_HERE}.adaptive:AdaptiveFeedback",
    "adaptive-quantguard": f"{_HERE}.adaptive_quantguard:AdaptiveQuantguard",
    "adaptive-free": f"{_HERE}.adaptive:AdaptiveFree",
    "adaptive-greedy": f"{_HERE}.adaptive:AdaptiveGreedy",
}
"""Name -> `module:Class`."""


def source_of(name: str) -> str:
    """File name of the attack's module, for the cache's keys."""
    return ATTACKS[name].partition(":")[0].rpartition(".")[2] + ".py"


def make_attack(name: str) -> "Attack":
    """The attack of a name.

    Raises:
        UnsupportedError: no such attack.
    """
    if name not in ATTACKS:
        raise UnsupportedError(f"--attack {name!r}: choose one of {', '.join(ATTACKS)}")
    module, _, cls = ATTACKS[name].partition(":")
    attack: Attack = getattr(importlib.import_module(module), cls)()
    return attack
