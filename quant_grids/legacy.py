"""The legacy formats: 32 weights of a row share one fp16 scale `d`, and one fp16 offset `m` in the `_1` types.

Source of the layouts: `ggml-common.h` and `dequantize_row_*` in `ggml-quants.c` of llama.cpp.
"""

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from quant_grids.base import UniformGrid, Unpacked
from quant_grids.bits import join_bits, join_nibbles, split_bits, split_nibbles


class LegacyGrid(UniformGrid, abstract=True):
    """What Q4_0 to Q8_0 share: 32 weights, one scale, at most one offset."""

    block_size = 32
    sub_size = 32

    def unpack(self, blocks: Tensor) -> Unpacked:
        """See `ScalarGrid.unpack`."""
        offset = self.half(blocks, "m") if "m" in self.fields else None
        return Unpacked(self._codes(blocks), self.half(blocks, "d"), offset)

    def _codes(self, blocks: Tensor) -> Tensor:
        return split_nibbles(self.field(blocks, "qs"), 16)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = join_nibbles(codes, 16)
        return packed


class Q4_0(LegacyGrid):  # noqa: N801 - the type's name in ggml
    """`block_q4_0`: 4.5 bits per weight, `x = d * (q - 8)`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale |
    | 2-17 | qs | codes: byte i = `BBBBAAAA`, A = weight i, B = weight i + 16 |
    """

    ggml_type = GGMLQuantizationType.Q4_0
    fields = {"d": 2, "qs": 16}
    first_level, n_levels = -8, 16


class Q4_1(LegacyGrid):  # noqa: N801
    """`block_q4_1`: 5 bits per weight, `x = d * q + m`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale |
    | 2-3 | m | fp16 offset |
    | 4-19 | qs | codes as in Q4_0 |
    """

    ggml_type = GGMLQuantizationType.Q4_1
    fields = {"d": 2, "m": 2, "qs": 16}
    first_level, n_levels = 0, 16


class FiveBitGrid(LegacyGrid, abstract=True):
    """Low four bits in `qs` as in Q4_0, the fifth of weight j is bit j of the little-endian 32-bit `qh`."""

    def _codes(self, blocks: Tensor) -> Tensor:
        return super()._codes(blocks) | (split_bits(self.field(blocks, "qh")) << 4)

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = super().pack(blocks, codes & 0x0F)
        self.field(packed, "qh")[:] = join_bits(codes >> 4)
        return packed


class Q5_0(FiveBitGrid):  # noqa: N801
    """`block_q5_0`: 5.5 bits per weight, `x = d * (q - 16)`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale |
    | 2-5 | qh | fifth bits: bit j belongs to weight j |
    | 6-21 | qs | low four bits as in Q4_0 |
    """

    ggml_type = GGMLQuantizationType.Q5_0
    fields = {"d": 2, "qh": 4, "qs": 16}
    first_level, n_levels = -16, 32


class Q5_1(FiveBitGrid):  # noqa: N801
    """`block_q5_1`: 6 bits per weight, `x = d * q + m`.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale |
    | 2-3 | m | fp16 offset |
    | 4-7 | qh | fifth bits: bit j belongs to weight j |
    | 8-23 | qs | low four bits as in Q4_0 |
    """

    ggml_type = GGMLQuantizationType.Q5_1
    fields = {"d": 2, "m": 2, "qh": 4, "qs": 16}
    first_level, n_levels = 0, 32


class Q8_0(LegacyGrid):  # noqa: N801
    """`block_q8_0`: 8.5 bits per weight, `x = d * q`, q a signed byte.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale |
    | 2-33 | qs | one int8 per weight |

    The quantizer never writes -128 (some integer kernels cannot negate it) and no flip goes there: the level exists so that
    any byte can be read and written back.
    """

    ggml_type = GGMLQuantizationType.Q8_0
    fields = {"d": 2, "qs": 32}
    first_level, n_levels = -128, 256
    lowest_target = -127

    def _codes(self, blocks: Tensor) -> Tensor:
        # int8 two's complement to ascending codes 0..255: flip the sign bit.
        return self.field(blocks, "qs") ^ 0x80

    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """See `ScalarGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = codes ^ torch.tensor(0x80, dtype=torch.uint8, device=codes.device)
        return packed
