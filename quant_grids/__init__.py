"""What the bytes of a quantized tensor mean: one class per format, nothing about files.

Every scalar format stores, per block, integer *codes* and the few numbers that turn a code into a weight:

    weight = scale * levels[code] + offset

The classes here unpack blocks into (codes, scale, offset), put changed codes back without touching any other bit, and list
the *flips* that a rounding defense can choose from.

Glossary (upstream names are kept so that the code can be held against ggml's C):

* **block**: the unit of storage, 32 to 256 weights of one row; **super-block**: a 256-weight block of a k-quant;
  **sub-block**: the weights of a super-block that share one scale.
* **code**: the small integer stored for a weight. **level**: the number that the code stands for, before scaling.
* **d**, **dmin**: the fp16 scale and offset scale of a block; **scales**: the packed sub-block scales (and mins).
* **qs**, **ql**, **qh**: the code bits (all, low, high).
* **flip**: taking the level on the other side of the full-precision weight, see `quant_grids.base`.

Use `grid_for(ggml_type)`; `GRIDS` maps every type that has a grid.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant_grids.base import (
        GRIDS,
        Flips,
        Grid,
        Outcome,
        ScalarFlips,
        ScalarGrid,
        UniformGrid,
        Unpacked,
        grid_for,
    )

__all__ = [
    "GRIDS",
    "Flips",
    "Grid",
    "Outcome",
    "ScalarFlips",
    "ScalarGrid",
    "UniformGrid",
    "Unpacked",
    "grid_for",
]


def __getattr__(name: str) -> Any:
    """Import torch only when a grid is asked for: `qguard-edge --help` needs the errors of this package, not its grids."""
    if name in __all__:
        importlib.import_module("quant_grids.formats")
        return getattr(importlib.import_module("quant_grids.base"), name)
    raise AttributeError(f"module 'quant_grids' has no attribute {name!r}")
