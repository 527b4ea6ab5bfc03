"""No defense: llama.cpp's own rounding, the baseline of every table."""

from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.defenses.options import NoneOptions
from quant_grids import Flips


class NoDefense(Defense[NoneOptions]):
    """Takes no flip."""

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """See `Defense.choose`."""
        return torch.zeros_like(flips.ratio)
