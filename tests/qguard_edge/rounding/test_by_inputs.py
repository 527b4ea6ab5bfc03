"""The order of the walk by inputs."""

from types import SimpleNamespace
from typing import Any, cast

from qguard_edge.defenses.base import Inputs
from qguard_edge.rounding.by_inputs import MatrixWork, in_order_of_inputs


def test_matrices_with_the_same_inputs_come_after_one_another() -> None:
    """Expert by expert, so that what is made of an expert's inputs need not be kept for all of them."""
    shared = dict.fromkeys(("gate", "up"), ("gate", "up")) | {name: (name,) for name in ("down", "q")}
    inputs = cast(Inputs, SimpleNamespace(names=tuple(shared), shares=shared.__getitem__))
    unseen: dict[str, Any] = dict.fromkeys(("grid", "columns", "first", "rows", "read", "key", "sink"))
    names = [("gate", 3), ("q", 1), ("down", 3), ("up", 3), ("embedding", 1)]
    matrices = [MatrixWork(name=name, expert=expert, **unseen) for name, count in names for expert in range(count)]
    ordered = [(matrix.name, matrix.expert) for matrix in in_order_of_inputs(matrices, inputs)]
    pairs = [("gate", 0), ("up", 0), ("gate", 1), ("up", 1), ("gate", 2), ("up", 2)]
    assert ordered == [*pairs, ("q", 0), ("down", 0), ("down", 1), ("down", 2), ("embedding", 0)]
    assert in_order_of_inputs(matrices, None) == matrices
