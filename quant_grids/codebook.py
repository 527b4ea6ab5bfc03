"""Four-bit formats whose levels are a table: IQ4_NL, IQ4_XS, MXFP4, NVFP4.

Source of the layouts: `ggml-common.h` and `dequantize_row_*` in `ggml-quants.c` of llama.cpp. The tables themselves are read
from the classes of `gguf.quants`.

The two tables
--------------
* **IQ4** (`kvalues_iq4nl`, int8): 16 levels from -127 to 113, spaced about 10 apart near zero and 20 to 25 at the ends,
  since weights crowd around zero. Indexed by the stored nibble, which rises with the level. There is no zero; the level
  nearest to it is +1. Fitted once to the weights of language models by llama.cpp's authors.
* **E2M1** (`kvalues_mxfp4`, int8; MXFP4 and NVFP4): the 4-bit float of the OCP Microscaling specification, one sign bit, two
  exponent bits, one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6. Stored doubled, so that they are integers, and the scale is
  halved to match. The index is the *bit pattern* `SEEM`: 0-7 are the values from 0 up, 8-15 the same with the sign set,
  so patterns do not rise with the level, and 0 and 8 are both zero. Codes here are ranks: 15 levels from -12 to 12, code 7
  being zero. `pack` keeps the pattern of a weight that was and stays zero; a weight that becomes zero is written as +0.
"""

import functools
from typing import ClassVar

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from quant_grids.base import ScalarGrid, Unpacked
from quant_grids.bits import join_nibbles, split_nibbles


class NibbleGrid(ScalarGrid, abstract=True):
    """What the four share: a nibble per weight in `qs`, low nibbles of a run of `run` bytes first."""

    run: ClassVar[int]

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`."""
        return Unpacked(self._codes(self.field(blocks, "qs")), self._scales(blocks), None)

    def _codes(self, packed: Tensor) -> Tensor:
        return split_nibbles(packed, self.run)

    def _scales(self, blocks: Tensor) -> Tensor:
        raise NotImplementedError

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_nibbles(codes, self.run)
        return packed


class IQ4_NL(NibbleGrid):  # noqa: N801 - the type's name in ggml
    """`block_iq4_nl`: 4.5 bits per weight, `x = d * table[q]`, the IQ4 table.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale |
    | 2-17 | qs | codes: byte i = `BBBBAAAA`, A = weight i, B = weight i + 16 |
    """

    ggml_type = GGMLQuantizationType.IQ4_NL
    fields = {"d": 2, "qs": 16}
    block_size, sub_size, run = 32, 32, 16
    levels = tuple(float(level) for level in quants.IQ4_NL.kvalues)

    def _scales(self, blocks: Tensor) -> Tensor:
        return self.half(blocks, "d")


class IQ4_XS(NibbleGrid):  # noqa: N801
    """`block_iq4_xs`: 4.25 bits per weight, 8 sub-blocks of 32 with 6-bit scales, `x = d*(ls - 32)*table[q]`, the IQ4 table.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-3 | scales_h | bits 4-5 of the scales: `DDCCBBAA HHGGFFEE`, A-H = sub-blocks 0-7 |
    | 4-7 | scales_l | bits 0-3: `BBBBAAAA DDDDCCCC FFFFEEEE HHHHGGGG` |
    | 8-135 | qs | codes: 8 runs of 16 bytes, each as in IQ4_NL |
    """

    ggml_type = GGMLQuantizationType.IQ4_XS
    fields = {"d": 2, "scales_h": 2, "scales_l": 4, "qs": 128}
    block_size, sub_size, run = 256, 32, 16
    levels = IQ4_NL.levels

    def _scales(self, blocks: Tensor) -> Tensor:
        low, high = self.field(blocks, "scales_l"), self.field(blocks, "scales_h")
        # A run of one byte puts the values of each byte next to each other.
        pairs = torch.stack((high & 3, (high >> 2) & 3, (high >> 4) & 3, high >> 6), dim=2).view(-1, 8)
        return self.half(blocks, "d") * ((split_nibbles(low, 1) | (pairs << 4)).float() - 32.0)


class FloatNibbleGrid(NibbleGrid, abstract=True):
    """MXFP4 and NVFP4: nibbles are E2M1 bit patterns, codes are their ranks, see the module docstring."""

    levels = tuple(float(level) for level in sorted(set(quants.MXFP4.kvalues)))

    def _codes(self, packed: Tensor) -> Tensor:
        return _rank(split_nibbles(packed, self.run))

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        stored = self.field(packed, "qs")
        patterns = _pattern(codes)
        # What was minus zero (pattern 8) and is zero again keeps its sign.
        kept_sign = _is_zero(split_nibbles(stored, self.run) ^ 8).bitwise_and_(_is_zero(patterns))
        stored[:] = join_nibbles(patterns | (kept_sign << 3), self.run)
        return packed


class MXFP4(FloatNibbleGrid):
    """`block_mxfp4`: 4.25 bits per weight, `x = 2^(e - 128) * table[q]`, the doubled E2M1 table.

    | bytes | field | meaning |
    |---|---|---|
    | 0 | e | E8M0 scale: an exponent without sign or mantissa; here halved, to match the doubled table |
    | 1-16 | qs | bit patterns: byte i = `BBBBAAAA`, A = weight i, B = weight i + 16 |

    The specification's 255 means "not a number"; ggml decodes it as 2^127 like any other exponent, and so does this class.
    0 and 1 give subnormal numbers (2^-128, 2^-127).
    """

    ggml_type = GGMLQuantizationType.MXFP4
    fields = {"e": 1, "qs": 16}
    block_size, sub_size, run = 32, 32, 16

    def _scales(self, blocks: Tensor) -> Tensor:
        return _e8m0_table(blocks.device)[self.field(blocks, "e").int()]


class NVFP4(FloatNibbleGrid):
    """`block_nvfp4`: 4.5 bits per weight, 4 sub-blocks of 16, `x = ue4m3(d)/2 * table[q]`, the doubled E2M1 table.

    | bytes | field | meaning |
    |---|---|---|
    | 0-3 | d | UE4M3 scale of each sub-block: `-EEEEMMM`, 4 exponent bits (bias 7), 3 mantissa bits; bit 7 is ignored |
    | 4-35 | qs | bit patterns: 4 runs of 8 bytes, byte i = `BBBBAAAA`, A = weight i, B = weight i + 8 of the sub-block |

    0 and 127 ("not a number") are zero. The same two with bit 7 set are not special: 128 is zero by its value, 255 is 240.
    """

    ggml_type = GGMLQuantizationType.NVFP4
    fields = {"d": 4, "qs": 32}
    block_size, sub_size, run = 64, 16, 8

    def _scales(self, blocks: Tensor) -> Tensor:
        return _ue4m3_table(blocks.device)[self.field(blocks, "d").int()]


# The three below are written without comparisons, which cost several times as much as arithmetic on bytes.
def _rank(patterns: Tensor) -> Tensor:
    """Rank of E2M1 bit patterns among the levels: 0..7 -> 7..14, 8..15 -> 7..0; uint8, any shape."""
    sign = patterns >> 3
    return (patterns ^ (sign * 15)).sub_(sign * 7).add_(7)


def _pattern(ranks: Tensor) -> Tensor:
    """Inverse of `_rank`: 7..14 -> 0..7, 6..0 -> 9..15."""
    sign = (ranks + 121) >> 7 ^ 1
    return (ranks ^ (sign * 15)).add_(sign * 7).sub_(7)


def _is_zero(nibbles: Tensor) -> Tensor:
    """1 where a value in 0..15 is zero, else 0; uint8."""
    return (nibbles + 15) >> 4 ^ 1


@functools.cache
def _e8m0_table(device: torch.device) -> Tensor:
    """f32 `[256]`: half the value of each E8M0 byte, as gguf decodes it."""
    return torch.from_numpy(quants.MXFP4.e8m0_to_fp32_half(np.arange(256, dtype=np.uint8)).copy()).to(device)


@functools.cache
def _ue4m3_table(device: torch.device) -> Tensor:
    """f32 `[256]`: half the value of each UE4M3 byte, as gguf decodes it."""
    return torch.from_numpy(quants.NVFP4.ue4m3_to_fp32(np.arange(256, dtype=np.uint8)).astype(np.float32)).to(device)
