"""The k-quants: super-blocks of 256 weights, sub-blocks of 16 or 32 with small integer scales under one fp16 `d`.

Source of the layouts: `ggml-common.h` and `dequantize_row_*_K` in `ggml-quants.c` of llama.cpp.

Packed scales of Q4_K and Q5_K
------------------------------
Eight 6-bit scales and eight 6-bit mins share 12 bytes. Letters A-H are the scales of sub-blocks 0-7, a-h their mins:

    bytes 0-3     EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD      upper two bits: bits 4-5 of the scales of sub-blocks 4-7
    bytes 4-7     eeaaaaaa ffbbbbbb ggcccccc hhdddddd      upper two bits: bits 4-5 of the mins of sub-blocks 4-7
    bytes 8-11    eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH      low four bits of both

Packed scales of Q3_K
---------------------
Sixteen 6-bit scales share 12 bytes. Letters A-P are the scales of sub-blocks 0-15:

    bytes 0-7     IIIIAAAA JJJJBBBB KKKKCCCC LLLLDDDD MMMMEEEE NNNNFFFF OOOOGGGG PPPPHHHH      bits 0-3
    bytes 8-11    MMIIEEAA NNJJFFBB OOKKGGCC PPLLHHDD                                          bits 4-5

The scale bits are only ever read here: a defense changes codes, never scales.
"""

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from quant_grids.base import UniformGrid, Unpacked
from quant_grids.bits import join_nibbles, join_pairs, join_planes, split_nibbles, split_pairs, split_planes


class KGrid(UniformGrid, abstract=True):
    """What the k-quants share: 256 weights to a super-block."""

    block_size = 256

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`."""
        scale, offset = self._scales(blocks)
        return Unpacked(self._codes(blocks), scale, offset)

    def _scales(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _codes(self, blocks: Tensor) -> Tensor:
        raise NotImplementedError


class Q2_K(KGrid):  # noqa: N801 - the type's name in ggml
    """`block_q2_K`: 2.625 bits per weight, 16 sub-blocks of 16, `x = d*sc*q - dmin*m`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-15 | scales | byte i = `MMMMSSSS`: S = 4-bit scale of sub-block i, M = its 4-bit min |
    | 16-79 | qs | codes: 2 runs of 32 bytes, byte i of run k = `DDCCBBAA`, A, B, C, D = weights 128k + i + 0, 32, 64, 96 |
    | 80-81 | d | fp16 scale of the scales |
    | 82-83 | dmin | fp16 scale of the mins |
    """

    ggml_type = GGMLQuantizationType.Q2_K
    fields = {"scales": 16, "qs": 64, "d": 2, "dmin": 2}
    sub_size = 16
    first_level, n_levels = 0, 4

    def _scales(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        packed = self.field(blocks, "scales")
        return self.half(blocks, "d") * (packed & 15), -(self.half(blocks, "dmin") * (packed >> 4))

    def _codes(self, blocks: Tensor) -> Tensor:
        return split_pairs(self.field(blocks, "qs"), 32)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_pairs(codes, 32)
        return packed


class Q3_K(KGrid):  # noqa: N801
    """`block_q3_K`: 3.4375 bits per weight, 16 sub-blocks of 16 with 6-bit scales, `x = d*(sc - 32)*(q - 4)`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-31 | hmask | third bits: byte i = `HGFEDCBA`, A-H = weights i + 0, 32, ... 224 |
    | 32-95 | qs | low two bits as in Q2_K |
    | 96-107 | scales | packed scales, see the module docstring |
    | 108-109 | d | fp16 scale of the scales |

    ggml reads the third bit as "do not subtract 4" from the low two bits, which is the same number.
    """

    ggml_type = GGMLQuantizationType.Q3_K
    fields = {"hmask": 32, "qs": 64, "scales": 12, "d": 2}
    sub_size = 16
    first_level, n_levels = -4, 8

    def _scales(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        packed = self.field(blocks, "scales")
        low, high = split_nibbles(packed[:, :8], 8), split_pairs(packed[:, 8:], 4)
        return self.half(blocks, "d") * ((low | (high << 4)).float() - 32.0), None

    def _codes(self, blocks: Tensor) -> Tensor:
        return split_pairs(self.field(blocks, "qs"), 32) | (split_planes(self.field(blocks, "hmask")) << 2)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_pairs(codes & 3, 32)
        self.field(packed, "hmask")[:] = join_planes(codes >> 2)
        return packed


class SixBitScaleGrid(KGrid, abstract=True):
    """Q4_K and Q5_K: sub-blocks of 32, `x = d*sc*q - dmin*m` with 6-bit `sc` and `m`."""

    sub_size = 32

    def _scales(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        packed = self.field(blocks, "scales")
        first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
        scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
        mins = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
        return self.half(blocks, "d") * scales, -(self.half(blocks, "dmin") * mins)


class Q4_K(SixBitScaleGrid):  # noqa: N801
    """`block_q4_K`: 4.5 bits per weight, 8 sub-blocks of 32, `x = d*sc*q - dmin*m`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-3 | dmin | fp16 scale of the mins |
    | 4-15 | scales | packed scales and mins, see the module docstring |
    | 16-143 | qs | codes: 4 runs of 32 bytes, byte i of run k = `BBBBAAAA`, A = weight 64k + i, B = weight 64k + 32 + i |
    """

    ggml_type = GGMLQuantizationType.Q4_K
    fields = {"d": 2, "dmin": 2, "scales": 12, "qs": 128}
    first_level, n_levels = 0, 16

    def _codes(self, blocks: Tensor) -> Tensor:
        return split_nibbles(self.field(blocks, "qs"), 32)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_nibbles(codes, 32)
        return packed


class Q5_K(SixBitScaleGrid):  # noqa: N801
    """`block_q5_K`: 5.5 bits per weight, 8 sub-blocks of 32, `x = d*sc*q - dmin*m`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-3 | dmin | fp16 scale of the mins |
    | 4-15 | scales | packed scales and mins, see the module docstring |
    | 16-47 | qh | fifth bits: byte i = `HGFEDCBA`, one bit for weight i of each sub-block, A = sub-block 0 |
    | 48-175 | qs | low four bits as in Q4_K |
    """

    ggml_type = GGMLQuantizationType.Q5_K
    fields = {"d": 2, "dmin": 2, "scales": 12, "qh": 32, "qs": 128}
    first_level, n_levels = 0, 32

    def _codes(self, blocks: Tensor) -> Tensor:
        low = split_nibbles(self.field(blocks, "qs"), 32).view(-1, 8, 32)
        high = self.field(blocks, "qh").unsqueeze(1) >> _shifts(8, 1, blocks.device).view(1, 8, 1)
        return (low | ((high & 1) << 4)).view(-1, 256)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_nibbles(codes & 15, 32)
        high = (codes >> 4).view(-1, 8, 32)
        bits = high[:, 0].clone()
        for i in range(1, 8):
            bits |= high[:, i] << i
        self.field(packed, "qh")[:] = bits
        return packed


class Q6_K(KGrid):  # noqa: N801
    """`block_q6_K`: 6.5625 bits per weight, 16 sub-blocks of 16 with int8 scales, `x = d*sc*(q - 32)`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-127 | ql | low four bits |
    | 128-191 | qh | high two bits |
    | 192-207 | scales | int8 per sub-block |
    | 208-209 | d | fp16 scale of the scales |

    Each half of 128 weights owns 64 bytes of `ql` and 32 bytes of `qh`; with A, B, C, D = weights i, i+32, i+64, i+96:

        ql[i]      CCCCAAAA
        ql[i+32]   DDDDBBBB
        qh[i]      DDCCBBAA
    """

    ggml_type = GGMLQuantizationType.Q6_K
    fields = {"ql": 128, "qh": 64, "scales": 16, "d": 2}
    sub_size = 16
    first_level, n_levels = -32, 64

    def _scales(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        scales = self.field(blocks, "scales").contiguous().view(torch.int8)
        return self.half(blocks, "d") * scales, None

    def _codes(self, blocks: Tensor) -> Tensor:
        low = split_nibbles(self.field(blocks, "ql"), 64).view(-1, 2, 4, 32)
        high = self.field(blocks, "qh").view(-1, 2, 1, 32) >> _shifts(4, 2, blocks.device).view(1, 1, 4, 1)
        return (low | ((high & 3) << 4)).view(-1, 256)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "ql")[:] = join_nibbles(codes & 15, 64)
        high = (codes >> 4).view(-1, 2, 4, 32)
        bits = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
        self.field(packed, "qh")[:] = bits.view(-1, 64)
        return packed


def _shifts(count: int, width: int, device: torch.device) -> Tensor:
    """uint8 `[count]`: 0, width, 2*width, ..."""
    return torch.arange(0, count * width, width, dtype=torch.uint8, device=device)
