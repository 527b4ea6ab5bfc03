"""Kept pieces of a verification are checked: one answer in place of a batch was accepted, ids out of range aborted llama.cpp."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qguard_edge.runtimes.batching import Answer
from qguard_edge.verify.drift import DocumentDrift
from qguard_edge.verify.keep import MOST_TOKENS, WorkFolder

MADE = [Answer((1, 2), True), Answer((3,), False)]


@pytest.mark.parametrize(
    "kept",
    [
        [[[1], True]],
        [[[1], True]] * 3,
        [[[1, 2, 3, 4, 5], True], [[1], True]],
        [[[-1], True], [[1], True]],
        [[[MOST_TOKENS], True], [[1], True]],
        [[[1.5], True], [[1], True]],
        [[["1"], True], [[1], True]],
        [[[True], True], [[1], True]],
        [["12", True], [[1], True]],
        [[[1], "yes"], [[1], True]],
        {"a": 1},
        7,
        None,
        [[[10**400], True], [[1], True]],
    ],
)
def test_a_piece_that_cannot_be_one_is_made_again(kept: object, tmp_path: Path) -> None:
    (tmp_path / "answers-k.json").write_text(json.dumps(kept))
    work = WorkFolder(tmp_path)
    assert work.answers("k", lambda: MADE, count=2, longest=4) == MADE
    assert work.answers("k", list, count=2, longest=4) == MADE  # and kept


def test_a_measurement_that_cannot_be_one_is_made_again(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    good = DocumentDrift(np.zeros(3), np.ones(3, np.bool_), np.zeros(3))
    work.put_drift("k", good)
    assert work.drift("k", 4) is not None
    assert work.drift("k", 5) is None
    nan, negative = np.full(3, np.nan), np.full(3, -1.0)
    impossible: list[tuple[Any, Any, Any]] = [
        (nan, good.same, good.loss),
        (negative, good.same, good.loss),
        (good.kl, good.same, nan),
        (good.kl, good.kl, good.loss),
        (good.kl[None], good.same, good.loss),
        (good.kl.astype(np.float32), good.same, good.loss),
    ]
    for kl, same, loss in impossible:
        work.put_drift("k", DocumentDrift(kl, same, loss))
        assert work.drift("k", 4) is None
    with (tmp_path / "drift-k.npz").open("wb") as file:
        np.savez_compressed(file, kl=np.zeros(1 << 20), same=good.same, loss=good.loss)
    tracemalloc.start()
    assert work.drift("k", 4) is None
    assert tracemalloc.get_traced_memory()[1] < 4 << 20  # small as a file, and not when it is unpacked
    tracemalloc.stop()
    (tmp_path / "drift-k.npz").write_bytes(b"PK\x03\x04 no archive")
    assert work.drift("k", 4) is None
