"""One- and two-bit formats: TQ1_0, TQ2_0, Q1_0, Q2_0. One fp16 scale `d` per block, levels that are small integers.

Source of the layouts: `ggml-common.h`, `dequantize_row_*` and `quantize_row_*_ref` in `ggml-quants.c` of llama.cpp.

They suit models that were trained with ternary or binary weights. An ordinary model's error there is as large as its
weights, and so is what a defense changes.
"""

import functools

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from quant_grids.base import ScalarGrid, UniformGrid, Unpacked
from quant_grids.bits import join_bits, join_pairs, split_bits, split_pairs
from quant_grids.ggml_type import type_of

TRITS = 5  # ternary digits in a byte: 3^5 = 243 <= 256


class TQ1_0(UniformGrid):  # noqa: N801 - the type's name in ggml
    """`block_tq1_0`: 1.6875 bits per weight, `x = d * (q - 1)`, q a ternary digit.

    | bytes | field | meaning |
    |---|---|---|
    | 0-47 | qs | five digits per byte: 32 bytes of weights 0-159, then 16 bytes of weights 160-239 |
    | 48-51 | qh | four digits per byte: weights 240-255 |
    | 52-53 | d | fp16 scale |

    A byte is a fraction of 256 written in base 3, first digit first, rounded up: `byte = ceil(256 * 0.ABCDE)`. So digit n is
    `floor(3 * frac(byte * 3^n / 256))`, which is a multiplication in wrapping bytes and a shift: no division. In a run
    of k bytes, digit n of byte i belongs to weight `n*k + i`. The fifth digit of a `qh` byte means nothing.

    256 bytes hold 243 numbers, so 13 of them have a second spelling, which the quantizer never writes. `pack` writes only
    the bytes whose digits change.
    """

    ggml_type = GGMLQuantizationType.TQ1_0
    fields = {"qs": 48, "qh": 4, "d": 2}
    block_size, sub_size = 256, 256
    first_level, n_levels = -1, 3
    runs = ((0, 32, 5), (32, 16, 5), (48, 4, 4))  # first byte, bytes, digits per byte

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`."""
        parts = []
        for start, length, digits in self.runs:
            shifted = blocks[:, start : start + length].unsqueeze(1) * _powers(digits, blocks.device)
            parts.append((shifted.short().mul_(3) >> 8).to(torch.uint8).view(len(blocks), -1))
        return Unpacked(torch.cat(parts, dim=1), self.half(blocks, "d"), None)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        number_of, byte_of = _ternary_tables(blocks.device)
        weight = 0
        for start, length, digits in self.runs:
            stored = packed[:, start : start + length]
            planes = codes[:, weight : weight + digits * length].view(-1, digits, length)
            weight += digits * length
            number = planes[:, 0].clone()
            for i in range(1, digits):
                number.mul_(3).add_(planes[:, i])
            number *= 3 ** (TRITS - digits)
            before = number_of[stored.int()]
            before -= before % 3 ** (TRITS - digits)
            stored[:] = torch.where(number == before, stored, byte_of[number.int()])
        return packed


class TQ2_0(UniformGrid):  # noqa: N801
    """`block_tq2_0`: 2.0625 bits per weight, `x = d * (q - 1)`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-63 | qs | 2 runs of 32 bytes, byte i of run k = `DDCCBBAA`, A, B, C, D = weights 128k + i + 0, 32, 64, 96 |
    | 64-65 | d | fp16 scale |

    The quantizer writes 0 to 2, for -1, 0 and 1. The code 3 (for 2) can be read and written back, but no flip goes there.
    """

    ggml_type = GGMLQuantizationType.TQ2_0
    fields = {"qs": 64, "d": 2}
    block_size, sub_size = 256, 256
    first_level, n_levels = -1, 4
    highest_target = 1

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`."""
        return Unpacked(split_pairs(self.field(blocks, "qs"), 32), self.half(blocks, "d"), None)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_pairs(codes, 32)
        return packed


class Q1_0(ScalarGrid):  # noqa: N801
    """`block_q1_0`: 1.125 bits per weight, `x = d` where the bit is set, else `-d`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale, the mean absolute weight |
    | 2-17 | qs | bit j of the little-endian 128-bit number belongs to weight j |

    The two levels lie 2 apart: a flip changes the sign of a weight that lies between them.
    """

    ggml_type = GGMLQuantizationType.Q1_0
    fields = {"d": 2, "qs": 16}
    block_size, sub_size = 128, 128
    levels = (-1.0, 1.0)

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`."""
        return Unpacked(split_bits(self.field(blocks, "qs")), self.half(blocks, "d"), None)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_bits(codes)
        return packed


class Q2_0(UniformGrid):  # noqa: N801
    """`block_q2_0`: 2.25 bits per weight, `x = d * (q - 1)`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale, the largest absolute weight |
    | 2-17 | qs | byte i = `DDCCBBAA`, A-D = weights 4i to 4i + 3 |

    The quantizer's scale is the largest absolute weight, so it never writes the code 3 (for 2); no weight lies beyond 1, so
    no flip gets there either, except in a block that another tool wrote.
    """

    ggml_type = type_of(42)
    fields = {"d": 2, "qs": 16}
    block_size, sub_size = 64, 64
    first_level, n_levels = -1, 4

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`."""
        # Runs of one byte: the four values of a byte are neighbours.
        return Unpacked(split_pairs(self.field(blocks, "qs"), 1), self.half(blocks, "d"), None)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_pairs(codes, 1)
        return packed


@functools.cache
def _powers(digits: int, device: torch.device) -> Tensor:
    """uint8 `[digits, 1]`: 3^n, which brings digit n of a byte to the front."""
    return torch.tensor([3**n for n in range(digits)], dtype=torch.uint8, device=device).view(-1, 1)


@functools.cache
def _ternary_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The number (0..242) that each byte spells, uint8 `[256]`, and the byte that the quantizer writes for each, `[243]`."""
    number_of = [sum(((byte * 3**n % 256 * 3) >> 8) * 3 ** (4 - n) for n in range(TRITS)) for byte in range(256)]
    byte_of = [-(-256 * number // 3**TRITS) for number in range(3**TRITS)]
    return (
        torch.tensor(number_of, dtype=torch.uint8, device=device),
        torch.tensor(byte_of, dtype=torch.uint8, device=device),
    )
