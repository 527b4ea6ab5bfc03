"""How fast are the grids, next to libggml's own quantizer and dequantizer?

Run: python scripts/bench/bench_grids.py [--types Q4_K,IQ2_XS] [--seconds 0.3] [--defense greedy|ortho]

For each type, in one run, on slices of 262,144 weights, as in a conversion: libggml's quantize and
dequantize through ctypes; our unpack; flips (which unpacks); choosing the flips, by a fixed threshold or with `ortho` at its
defaults; and apply (which packs). "harden" is flips + choose + apply, what a conversion spends per weight in addition to
libggml's quantize. All in million weights per second, with one thread and with two (one slice per thread, one torch
thread each; libggml through ctypes, which lets the other thread run). The best of the repeats counts, and the repeats of
the columns take turns, so that a busy machine slows all of them alike.

Goals: harden no slower than half of libggml's single-thread quantize for the k-quants and IQ4, at least 40 on two
threads for the other scalar types, no slower than libggml's quantize on as many threads for the lattice types.
Prints a table and, as the last line, one JSON object.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # for the oracle, which is the tests' own

from qguard_edge.defenses.base import SliceKey
from qguard_edge.defenses.options import OrthoOptions
from qguard_edge.defenses.ortho import Ortho
from quant_grids import GRIDS, Flips, Grid, ScalarGrid
from quant_grids.lattice_base import LatticeGrid
from tests.helpers import ggml_oracle

ROWS, COLUMNS = 128, 2048
HALF_OF_QUANTIZE = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}
STEPS = ("ggml_quantize", "ggml_dequantize", "unpack", "flips", "choose", "apply")


@dataclass(frozen=True)
class Rates:
    """Million weights per second with a number of threads."""

    ggml_quantize: float
    ggml_dequantize: float
    unpack: float
    flips: float
    choose: float
    apply: float
    harden: float


@dataclass(frozen=True)
class Row:
    """One type. `goal` is what `harden` should reach on `goal_threads`."""

    name: str
    kind: str
    bits_per_weight: float
    alignment: float
    added_error: float
    one_thread: Rates
    two_threads: Rates
    goal: float
    goal_threads: int
    met: bool


class Work:
    """One slice of one type, and the steps that are timed on it."""

    def __init__(self, grid: Grid, defense: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.grid, self.number = grid, int(grid.ggml_type)
        self.weights = (rng.standard_t(6, (ROWS, COLUMNS)) * 0.02).astype(np.float32)
        needs = ggml_oracle.requires_importance(self.number)
        self.importance = np.ones(COLUMNS, np.float32) if needs else None
        self.bytes = ggml_oracle.quantize(self.number, self.weights, self.importance)
        self.blocks, self.rows = torch.from_numpy(self.bytes), torch.from_numpy(self.weights)
        self.ortho = Ortho(OrthoOptions()) if defense == "ortho" else None
        self.key = SliceKey(seed, grid.name, 0)
        self.found = grid.flips(self.blocks, self.rows)
        self.chosen = self.choose()

    def ggml_quantize(self) -> object:
        """The quantizer of libggml."""
        return ggml_oracle.quantize(self.number, self.weights, self.importance)

    def ggml_dequantize(self) -> object:
        """The dequantizer of libggml."""
        return ggml_oracle.dequantize(self.number, self.bytes)

    def unpack(self) -> object:
        """Take the blocks apart."""
        assert isinstance(self.grid, ScalarGrid | LatticeGrid)
        return self.grid.unpack(self.blocks)

    def flips(self) -> Flips:
        """List the flips; unpacks first."""
        return self.grid.flips(self.blocks, self.rows)

    def choose(self) -> Tensor:
        """Choose among them."""
        if self.ortho is not None:
            return self.ortho.choose(self.found, self.key)
        return self.found.ratio.gt(0.4).float()

    def apply(self) -> object:
        """Carry out the choice; packs."""
        return self.grid.apply(self.blocks, self.found, self.chosen)


def best_rates(works: list[Work], seconds: float) -> Rates:
    """Time every step with one thread per work; the steps take turns until the time is up."""
    best = dict.fromkeys(STEPS, float("inf"))
    with ThreadPoolExecutor(len(works)) as pool:

        def once(step: str, repeats: int) -> float:
            def run(work: Work) -> None:
                function: Callable[[], object] = getattr(work, step)
                for _ in range(repeats):
                    function()

            start = time.perf_counter()
            list(pool.map(run, works))
            return (time.perf_counter() - start) / repeats

        # Short steps are repeated within one measurement, so that waking the threads does not count.
        repeats = {step: max(1, int(0.004 / once(step, 1))) for step in STEPS}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for step in STEPS:
                best[step] = min(best[step], once(step, repeats[step]))
    weights = len(works) * ROWS * COLUMNS / 1e6
    harden = weights / (best["flips"] + best["choose"] + best["apply"])
    return Rates(**{step: weights / best[step] for step in STEPS}, harden=harden)


def measure(grid: Grid, defense: str, seconds: float) -> Row:
    """All figures of one type."""
    works = [Work(grid, defense, seed) for seed in (0, 1)]
    one, two = best_rates(works[:1], seconds), best_rates(works, seconds)
    if isinstance(grid, LatticeGrid):
        goal, threads = one.ggml_quantize, 1
    elif grid.name in HALF_OF_QUANTIZE:
        goal, threads = one.ggml_quantize / 2, 1
    else:
        goal, threads = 40.0, 2
    _, outcome = grid.apply(works[0].blocks, works[0].found, works[0].chosen)
    return Row(
        name=grid.name,
        kind=grid.kind,
        bits_per_weight=grid.bits_per_weight,
        alignment=outcome.alignment,
        added_error=outcome.added_error,
        one_thread=one,
        two_threads=two,
        goal=goal,
        goal_threads=threads,
        met=(one if threads == 1 else two).harden >= goal,
    )


def show(rows: list[Row], console: Console) -> None:
    """The table for people."""
    table = Table(title="Million weights per second: one thread / two threads", title_justify="left")
    for heading in ("type", "bits", "ggml quantize", "dequantize", *STEPS[2:], "harden", "goal", ""):
        table.add_column(heading, justify="left" if heading in ("type", "") else "right")
    for row in rows:
        pairs = [(getattr(row.one_thread, step), getattr(row.two_threads, step)) for step in (*STEPS, "harden")]
        cells = ["/".join(f"{rate:.1f}" if rate < 100 else f"{rate:.0f}" for rate in pair) for pair in pairs]
        goal = f"{row.goal:.1f} on {row.goal_threads}"
        table.add_row(row.name, f"{row.bits_per_weight:.2f}", *cells, goal, "met" if row.met else "missed")
    console.print(table)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="", help="comma-separated; default: all")
    parser.add_argument("--seconds", type=float, default=0.3, help="per type and number of threads")
    parser.add_argument("--defense", choices=("greedy", "ortho"), default="ortho", help="what chooses the flips")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {name.strip().upper() for name in options.types.split(",") if name.strip()}
    unknown = wanted - {grid.name for grid in GRIDS.values()}
    if unknown:
        parser.error(f"no grid for {', '.join(sorted(unknown))}")
    order = [grid for kind in ("scalar", "lattice") for grid in GRIDS.values() if grid.kind == kind]
    rows = [measure(grid, options.defense, options.seconds) for grid in order if not wanted or grid.name in wanted]
    show(rows, Console(width=170))
    versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps({"benchmark": "grids", "defense": options.defense, **versions, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
