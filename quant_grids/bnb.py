"""The formats of bitsandbytes: NF4, FP4 and LLM.int8, on the same grid as ggml's.

bitsandbytes searches for nothing: a scale is the largest magnitude of a run of weights, and a code is the level nearest to
`weight / scale`. So, unlike for ggml's types, quantization itself is written here (`quantize`), ten lines per format; the
tests hold it and `dequantize` against bitsandbytes bit for bit. Source: `bitsandbytes/functional.py` and
`bitsandbytes/backends` (0.50), arXiv 2305.14314 (NF4), arXiv 2208.07339 (LLM.int8).

Blocks
------
bitsandbytes keeps codes and scales in separate tensors. A *block* here is what belongs together, made for the computation
only: the scale as f32, then the codes as bitsandbytes packs them. `convert.bnb_layout` takes blocks apart for the file.

* **NF4, FP4**: 64 weights of the *flattened* matrix, across row ends if need be; the last block may be short.
* **INT8**: one row; so the size of a block depends on the matrix, and there is a grid per row length.

The level tables
----------------
* **NF4** ("normal float"): quantiles of the normal distribution, 8 of the positive half and 7 of the negative half at equal
  steps of probability between 0.9677083 and 0.5, and zero; divided by the largest. The code is the rank of the level.
* **FP4**: one sign bit, two exponent bits, one mantissa bit, in an order of bit patterns that is bitsandbytes' own:
  0, 1/16, 8, 12, 4, 6, 2, 3 for the patterns 0-7, the same negative for 8-15, all divided by 12. Codes here are ranks: 15
  levels, code 7 being zero. On the CPU a positive weight that rounds to zero gets pattern 8, any other pattern 0; both mean
  zero. `pack` keeps the pattern of a zero that stays one and writes 0 for a new one.
* **INT8**: -127..127.

A tie between two levels goes to the lower one in NF4 and FP4, to the even one in INT8.
"""

import functools
from abc import abstractmethod
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from quant_grids.base import ScalarGrid, UniformGrid, Unpacked, slices_of
from quant_grids.errors import FormatError, UnsupportedError

BNB_KINDS = ("nf4", "fp4", "int8")
BLOCK = 64  # weights per scale of NF4 and FP4; transformers has no option for another
SMALLEST_SCALE = 1e-38  # what bitsandbytes divides by in place of a smaller scale
INT8_STEP = 7.874015718698502e-3  # bitsandbytes multiplies by this where the paper divides by 127
LARGEST_HALF = 65504.0


class BnbGrid(ScalarGrid, abstract=True):
    """What the three share: they quantize, and have a name of their own in place of a ggml type."""

    kind_name: ClassVar[str]

    @property
    def name(self) -> str:
        """NF4, FP4 or INT8."""
        return self.kind_name.upper()

    @abstractmethod
    def quantize(self, weights: Tensor) -> Tensor:
        """What bitsandbytes makes of a matrix.

        Args:
            weights: `[rows, columns]` of f32, f16 or bf16; not modified.

        Returns:
            Blocks, uint8 `[n_blocks, type_size]`.
        """

    @abstractmethod
    def as_rows(self, weights: Tensor) -> Tensor:
        """The matrix cut so that each row is a whole number of blocks, as `flips` needs it: f32."""

    @abstractmethod
    def cells(self, blocks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The interval of weights that round to given codes while the scales stay.

        Args:
            blocks: uint8 `[n_blocks, type_size]`, whose scales count.
            codes: uint8 of as many elements.

        Returns:
            Lower and upper end, f32 `[n_blocks, block_size]`; ends may round to either side.
        """

    @abstractmethod
    def sets_scale(self, weights: Tensor) -> Tensor:
        """Bool of the shape of `as_rows(weights)`: the weights that a scale is taken from, which may not move."""

    def scales(self, blocks: Tensor) -> Tensor:
        """The stored scale of each block, f32 `[n_blocks]`."""
        return self.field(blocks, "absmax").reshape(-1).clone().view(torch.float32)

    def with_scales(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """A copy of the blocks with other scales, f32 `[n_blocks]`."""
        made = blocks.clone()
        self.field(made, "absmax")[:] = scales.contiguous().view(torch.uint8).view(-1, 4)
        return made


class FourBitGrid(BnbGrid, abstract=True):
    """NF4 and FP4: blocks of 64, two codes per byte, the first in the high nibble: byte i = `AAAABBBB`, A = weight 2i.

    | bytes | field | meaning |
    |---|---|---|
    | 0-3 | absmax | f32 scale |
    | 4-35 | qs | bit patterns |
    """

    code_book: ClassVar[tuple[float, ...]]  # level of each bit pattern

    def __init__(self) -> None:
        self.block_size = self.sub_size = BLOCK
        self.fields = {"absmax": 4, "qs": BLOCK // 2}
        self.type_size = sum(self.fields.values())
        self._slices = slices_of(self.fields)

    def as_rows(self, weights: Tensor) -> Tensor:
        """See `BnbGrid.as_rows`: the matrix itself, or one row per block, zeros at the end, where blocks cross row ends."""
        if weights.shape[1] % BLOCK == 0:
            return weights.float()
        flat = weights.reshape(-1).float()
        return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)

    def quantize(self, weights: Tensor) -> Tensor:
        """See `BnbGrid.quantize`."""
        runs = self.as_rows(weights).view(-1, BLOCK)
        absmax = runs.abs().amax(1)
        scaled = runs * (1.0 / absmax.clamp(min=SMALLEST_SCALE)).unsqueeze(1)
        if weights.numel() % BLOCK:  # bitsandbytes divides in the last, short block
            absmax[-1:].clamp_(min=SMALLEST_SCALE)
            scaled[-1] = runs[-1] / absmax[-1]
        table = self.level_table(weights.device)
        ranks = torch.bucketize(scaled.clamp_(-1, 1), _middles(table), out_int32=True).to(torch.uint8)
        blocks = torch.zeros(len(runs), self.type_size, dtype=torch.uint8, device=weights.device)
        self.field(blocks, "qs")[:] = _join(self._fresh_patterns(ranks, scaled))
        return self.with_scales(blocks, absmax)

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`."""
        codes = self._ranks(_split(self.field(blocks, "qs")))
        return Unpacked(codes, self.scales(blocks).view(-1, 1), None)

    def cells(self, blocks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """See `BnbGrid.cells`."""
        table = self.level_table(blocks.device)
        middles = _middles(table)
        scale, index = self.scales(blocks).view(-1, 1), codes.view(len(blocks), BLOCK).int()
        low = torch.cat((table[:1], middles)).index_select(0, index.view(-1)).view(index.shape)
        high = torch.cat((middles, table[-1:])).index_select(0, index.view(-1)).view(index.shape)
        return low * scale, high * scale

    def sets_scale(self, weights: Tensor) -> Tensor:
        """See `BnbGrid.sets_scale`."""
        rows = self.as_rows(weights)
        runs = rows.view(-1, BLOCK).abs()
        return (runs >= runs.amax(1, keepdim=True)).view(rows.shape)

    def _ranks(self, patterns: Tensor) -> Tensor:
        """Rank of the level of each stored pattern, uint8."""
        return patterns

    def _fresh_patterns(self, ranks: Tensor, scaled: Tensor) -> Tensor:
        """The patterns that bitsandbytes stores for levels of these ranks and weights in units of the scale."""
        return ranks


def _normal_quantiles() -> tuple[float, ...]:
    """The 16 levels of NF4; f32 where bitsandbytes' generator uses f32, which makes them equal to the last bit."""
    inverse = NormalDist().inv_cdf
    positive = [inverse(p) for p in torch.linspace(0.9677083, 0.5, 9)[:-1].tolist()]
    negative = [-inverse(p) for p in torch.linspace(0.9677083, 0.5, 8)[:-1].tolist()]
    levels = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return tuple((levels / levels.max()).tolist())


class NF4(FourBitGrid, abstract=True):
    """4.5 bits per weight, `x = absmax * table[q]`; the code is the pattern."""

    kind_name = "nf4"
    code_book = levels = _normal_quantiles()

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = _join(codes)
        return packed


_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_ZERO = 7  # rank of the level zero


class FP4(FourBitGrid, abstract=True):
    """4.5 bits per weight, `x = absmax * table[q]`; codes are ranks of the patterns' levels, see the module docstring."""

    kind_name = "fp4"
    code_book = tuple((torch.tensor([*_FP4_MAGNITUDES, *(0.0 - m for m in _FP4_MAGNITUDES)]) / 12.0).tolist())
    levels = tuple(sorted(set(code_book)))

    def _ranks(self, patterns: Tensor) -> Tensor:
        ranks = torch.tensor([self.levels.index(value) for value in self.code_book], dtype=torch.uint8)
        return ranks.to(patterns.device).index_select(0, patterns.int().view(-1)).view(patterns.shape)

    def _patterns(self, ranks: Tensor) -> Tensor:
        table = torch.tensor([self.code_book.index(value) for value in self.levels], dtype=torch.uint8)
        return table.to(ranks.device).index_select(0, ranks.int().view(-1)).view(ranks.shape)

    def _fresh_patterns(self, ranks: Tensor, scaled: Tensor) -> Tensor:
        return self._patterns(ranks) | ((ranks == _ZERO) & (scaled > 0)).to(torch.uint8) << 3

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        stored = self.field(packed, "qs")
        before = _split(stored)
        # What was zero and is zero again keeps its pattern, 0 or 8.
        kept = ((self._ranks(before) == _ZERO) & (codes == _ZERO)).to(torch.uint8)
        stored[:] = _join(self._patterns(codes) | (before & (kept << 3)))
        return packed


class Int8Grid(UniformGrid, BnbGrid, abstract=True):
    """LLM.int8: 8 bits per weight and a scale per row, `x = SCB * q / 127`, q = -127..127. Use `bnb_grid`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-3 | absmax | f32 scale of the row (`SCB`) |
    | 4- | qs | int8 codes |

    Weights are cast to fp16 before anything else, so one beyond 65504 cannot be stored.
    """

    kind_name = "int8"
    first_level = lowest_target = -127
    highest_target, n_levels = 127, 255
    levels = tuple(float(level) for level in range(-127, 128))

    def __init__(self, columns: int) -> None:
        self.block_size = self.sub_size = columns
        self.fields = {"absmax": 4, "qs": columns}
        self.type_size = sum(self.fields.values())
        self._slices = slices_of(self.fields)

    def as_rows(self, weights: Tensor) -> Tensor:
        """See `BnbGrid.as_rows`."""
        return weights.float()

    def quantize(self, weights: Tensor) -> Tensor:
        """See `BnbGrid.quantize`.

        Raises:
            FormatError: a weight does not fit fp16.
        """
        half = weights.half().float()
        absmax = half.abs().amax(1)
        if not bool((absmax <= LARGEST_HALF).all()):
            raise FormatError(
                f"LLM.int8 casts weights to fp16 first, and one of {float(weights.abs().max()):g} is beyond its 65504 (or not a "
                "number); use nf4 or fp4, or leave the module out with --bnb-skip"
            )
        scaled = half * (127.0 / absmax).unsqueeze(1)
        scaled[absmax == 0] = 0.0
        blocks = torch.zeros(len(half), self.type_size, dtype=torch.uint8, device=weights.device)
        self.field(blocks, "qs")[:] = torch.round(scaled).to(torch.int8).view(torch.uint8)
        return self.with_scales(blocks, absmax)

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`; the byte -127..127 becomes the code 0..254, unsigned arithmetic wrapping around."""
        return Unpacked(self.field(blocks, "qs") + 127, (self.scales(blocks) * INT8_STEP).view(-1, 1), None)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = codes - 127
        return packed

    def dequantize(self, blocks: Tensor) -> Tensor:
        """See `Grid.dequantize`; the products are taken in bitsandbytes' order: code times scale, then the step."""
        self.check_blocks(blocks)
        return self.field(blocks, "qs").view(torch.int8) * self.scales(blocks).unsqueeze(1) * INT8_STEP

    def cells(self, blocks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """See `BnbGrid.cells`."""
        step = self.scales(blocks).view(-1, 1) * INT8_STEP
        level = self.levels_of(codes.view(len(blocks), -1))
        return (level - 0.5).clamp_(min=-127.0) * step, (level + 0.5).clamp_(max=127.0) * step

    def sets_scale(self, weights: Tensor) -> Tensor:
        """See `BnbGrid.sets_scale`: every weight that is the largest of its row after the cast."""
        half = weights.half().abs()
        return half >= half.amax(1, keepdim=True)


@functools.cache
def bnb_grid(kind: str, columns: int) -> BnbGrid:
    """The grid of a format for matrices with rows of `columns` weights.

    Raises:
        UnsupportedError: no such format.
    """
    if kind == "int8":
        return Int8Grid(columns)
    if kind not in BNB_KINDS:
        raise UnsupportedError(f"{kind!r} is not a format of bitsandbytes; choose one of {', '.join(BNB_KINDS)}")
    return NF4() if kind == "nf4" else FP4()


def _middles(table: Tensor) -> Tensor:
    """Half-way points between neighbouring levels."""
    return (table[:-1] + table[1:]) / 2


def _split(packed: Tensor) -> Tensor:
    """uint8 `[n, bytes]` -> `[n, 2 * bytes]`, the high nibble first."""
    return torch.stack((packed >> 4, packed & 0x0F), dim=2).view(len(packed), -1)


def _join(codes: Tensor) -> Tensor:
    """Inverse of `_split`."""
    pairs = codes.reshape(len(codes), -1, 2)
    return pairs[:, :, 0] << 4 | pairs[:, :, 1]
