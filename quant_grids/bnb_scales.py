"""Double quantization: the scales of NF4 and FP4, themselves stored in 8 bits (arXiv 2305.14314, section 3).

    scale = map[code] * largest[i // 256] + offset

`offset` is the mean of all scales of a matrix; what is left is cut into runs of 256, divided by the largest magnitude of the
run and rounded to the *dynamic map* (arXiv 1511.04561): 256 levels whose first bits say how many decimal places the number
has and whose remaining bits divide the decade evenly: 1 level between 1e-7 and 1e-6, 2 in the next decade, up to 64 between
0.1 and 1, each with both signs, and 0 and 1.

bitsandbytes' CPU build does not round the number itself but the nearest of 65,536 points between -1 and 1; followed here, so
that an undefended file is bitsandbytes' own to the last bit. Its CUDA build rounds the number: a code or two per thousand
differ by one level.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

NESTED_BLOCK = 256
_LAST_POINT = 65535
_DECADES = 7


@dataclass(frozen=True)
class NestedScales:
    """The scales of one matrix, compressed.

    Attributes:
        codes: uint8 `[n]`.
        largest: f32 `[ceil(n / 256)]`.
        offset: mean of the scales, an f32 number.
    """

    codes: Tensor
    largest: Tensor
    offset: float

    def expand(self) -> Tensor:
        """The scales that a loaded model computes with: f32 `[n]`."""
        table = dynamic_map().to(self.codes.device)
        factors = self.largest.repeat_interleave(NESTED_BLOCK)[: len(self.codes)]
        return table.index_select(0, self.codes.int()) * factors + self.offset


def compress_scales(scales: Tensor) -> NestedScales:
    """What bitsandbytes makes of the scales of a matrix, f32 `[n]`; not modified."""
    offset = scales.mean()
    rest = torch.nn.functional.pad(scales - offset, (0, -len(scales) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = rest.abs().amax(1)
    scaled = rest * (1.0 / largest).unsqueeze(1)
    points = torch.floor((scaled + 1.0) * (_LAST_POINT / 2) + 0.5) / (_LAST_POINT / 2) - 1.0
    table = dynamic_map().to(scales.device)
    codes = torch.bucketize(points, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    codes[largest == 0] = 0
    return NestedScales(codes.view(-1)[: len(scales)].clone(), largest, float(offset))


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 levels of the dynamic map, f32, ascending."""
    levels = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        magnitudes = 10 ** (decade - _DECADES + 1) * middles
        levels += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)
