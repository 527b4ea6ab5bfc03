"""Every format, imported so that it registers itself; import the public names from `quant_grids`."""

from quant_grids import codebook, kquants, lattice, legacy, ternary
from quant_grids.base import GRIDS, Flips, Grid, Outcome, ScalarFlips, ScalarGrid, UniformGrid, Unpacked, grid_for

__all__ = [
    "GRIDS",
    "Flips",
    "Grid",
    "Outcome",
    "ScalarFlips",
    "ScalarGrid",
    "UniformGrid",
    "Unpacked",
    "codebook",
    "grid_for",
    "kquants",
    "lattice",
    "legacy",
    "ternary",
]
