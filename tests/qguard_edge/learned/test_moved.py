"""What is left of the draws' entropy after steps: a floor, held against entropies that can be counted."""

import math
from collections import Counter

import torch

from qguard_edge.learned.matrices import Drawn
from qguard_edge.learned.moved import MovedCodes, bits_of_moves


def entropy(counts: Counter[tuple[int, ...]]) -> float:
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def test_the_floor_lies_below_the_entropy_that_is_left() -> None:
    """Eight fair coins, and rules that turn some of them; every outcome is counted."""
    draws = [tuple(int(bit) for bit in f"{number:08b}") for number in range(256)]

    def majority(draw: tuple[int, ...]) -> tuple[int, ...]:
        return (int(sum(draw) > 4),) * 8  # nothing is left but one bit

    def last_one_off(draw: tuple[int, ...]) -> tuple[int, ...]:
        index = max((i for i, bit in enumerate(draw) if bit), default=None)
        return tuple(0 if i == index else bit for i, bit in enumerate(draw))

    for rule in (majority, last_one_off, lambda draw: draw):
        left = entropy(Counter(map(rule, draws)))
        moves = [sum(a != b for a, b in zip(draw, rule(draw), strict=True)) for draw in draws]
        floor = 8.0 - sum(bits_of_moves(moved, 8) for moved in moves) / len(moves)
        assert floor <= left + 1e-9
    assert bits_of_moves(0, 8) == math.log2(9)  # that none was moved has to be said too


def test_few_moves_cost_little_and_many_leave_nothing() -> None:
    blocks = torch.zeros(1, 18, dtype=torch.uint8)
    bits = [MovedCodes(Drawn(blocks, 240_000.0), blocks, moved, 1_000_000).bits for moved in (0, 1_000, 10_000, 200_000)]
    assert abs(bits[0] - (240_000 - 20)) < 1
    # log2 of C(n, k) by its binary entropy: 11,408 and 80,793 bits.
    assert abs(bits[1] - (240_000 - 11_408 - 1_000 - 20)) < 20
    assert abs(bits[2] - (240_000 - 80_793 - 10_000 - 20)) < 20
    assert bits[3] == 0.0
