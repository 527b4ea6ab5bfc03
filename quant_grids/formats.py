"""Every format, imported so that it registers itself in `quant_grids.base.GRIDS`."""

from quant_grids import codebook, kquants, lattice, legacy, ternary

__all__ = ["codebook", "kquants", "lattice", "legacy", "ternary"]
