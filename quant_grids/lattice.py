"""The lattice formats' bytes: IQ1, IQ2 and IQ3. Their flips are explained in `quant_grids.lattice_base`.

Source of the layouts: `ggml-common.h` and `dequantize_row_iq*` in `ggml-quants.c` of llama.cpp. All are blocks of 256
weights, 32 groups of eight. A stored index names a point of the format's code book; its number has no meaning beyond its
place in the list. The books come from the classes of `gguf.quants`. They are the points, out of all that have such
coordinates, which llama.cpp's authors found the weights of models to come near most often.

| format | points | coordinates |
|---|---|---|
| IQ2_XXS, IQ2_XS, IQ2_S | 256, 512, 1024 of eight weights | 8, 25, 43 |
| IQ3_XXS | 256 of four weights | 4, 12, 20, 28, 36, 44, 52, 62 |
| IQ3_S | 512 of four weights | 1, 3, 5, 7, 9, 11, 13, 15 |
| IQ1_S, IQ1_M | 2048 of eight weights | -1, 0, 1 |
"""

import functools

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from quant_grids.base import Grid
from quant_grids.bits import join_bits, join_nibbles, join_pairs, split_bits, split_nibbles, split_pairs
from quant_grids.lattice_base import GROUPS, LatticeCodes, ShiftGrid, SignedGrid, code_book


class IQ2_XXS(SignedGrid):  # noqa: N801 - the type's name in ggml
    """`block_iq2_xxs`: 2.0625 bits per weight, `x = d*(0.5 + sc)/4 * point * sign`, 256 points, even signs.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-65 | qs | 8 runs of 8 bytes, one per 32 weights: four point indices, then a little-endian 32-bit word |

    The word, highest bit first, S = 4-bit scale `sc`, A-D = seven sign bits of each of the four groups:

        SSSSDDDD DDDCCCCC CCBBBBBB BAAAAAAA
    """

    ggml_type = GGMLQuantizationType.IQ2_XXS
    fields = {"d": 2, "qs": 64}
    book, even, largest_mark = "IQ2_XXS", True, 127

    def unpack(self, blocks: Tensor) -> LatticeCodes:
        """See `LatticeGrid.unpack`."""
        runs = self.field(blocks, "qs").view(-1, 8, 8)
        signs, sub_scale = _split_words(runs[:, :, 4:])
        scale = self.half(blocks, "d").view(-1, 1) * (0.5 + sub_scale.view(-1, 8)) * 0.25
        return LatticeCodes(runs[:, :, :4].reshape(-1, 1).int(), signs, _per_group(scale))

    def pack(self, blocks: Tensor, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.pack`."""
        packed = blocks.clone()
        runs = self.field(packed, "qs").view(-1, 8, 8)
        runs[:, :, :4] = index.view(-1, 8, 4).to(torch.uint8)
        runs[:, :, 4:] = _join_words(runs[:, :, 4:], mark)
        return packed


class IQ2_XS(SignedGrid):  # noqa: N801
    """`block_iq2_xs`: 2.3125 bits per weight, `x = d*(0.5 + sc)/4 * point * sign`, 512 points, even signs.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-65 | qs | a little-endian 16-bit word per group: `SSSSSSSI IIIIIIII`, S = seven sign bits, I = index |
    | 66-73 | scales | 4-bit scales of 16 weights each, low nibble first |
    """

    ggml_type = GGMLQuantizationType.IQ2_XS
    fields = {"d": 2, "qs": 64, "scales": 8}
    book, even, largest_mark = "IQ2_XS", True, 127

    def unpack(self, blocks: Tensor) -> LatticeCodes:
        """See `LatticeGrid.unpack`."""
        words = _words16(self.field(blocks, "qs")).view(-1)
        signs = _sign_patterns(blocks.device).index_select(0, words >> 9)
        return LatticeCodes((words & 511).view(-1, 1), signs, _sixteenths(self, blocks))

    def pack(self, blocks: Tensor, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.pack`."""
        packed = blocks.clone()
        words = index.view(-1) | ((mark & 127).int() << 9)
        self.field(packed, "qs")[:] = words.view(torch.uint8).view(-1, GROUPS, 4)[:, :, :2].reshape(-1, 64)
        return packed


class IQ2_S(SignedGrid):  # noqa: N801
    """`block_iq2_s`: 2.5625 bits per weight, `x = d*(0.5 + sc)/4 * point * sign`, 1024 points, free signs.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-33 | qs | low eight bits of the indices, one byte per group |
    | 34-65 | signs | sign bits, one byte per group (in C the second half of `qs`) |
    | 66-73 | qh | high two bits of the indices: byte i = `DDCCBBAA`, A-D = groups 4i to 4i + 3 |
    | 74-81 | scales | 4-bit scales of 16 weights each, low nibble first |
    """

    ggml_type = GGMLQuantizationType.IQ2_S
    fields = {"d": 2, "qs": 32, "signs": 32, "qh": 8, "scales": 8}
    book, even, largest_mark = "IQ2_S", False, 255

    def unpack(self, blocks: Tensor) -> LatticeCodes:
        """See `LatticeGrid.unpack`."""
        high = split_pairs(self.field(blocks, "qh"), 1).int() << 8
        index = self.field(blocks, "qs").int() | high
        return LatticeCodes(index.view(-1, 1), self.field(blocks, "signs").reshape(-1), _sixteenths(self, blocks))

    def pack(self, blocks: Tensor, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.pack`."""
        packed = blocks.clone()
        index = index.view(-1, GROUPS)
        self.field(packed, "qs")[:] = (index & 255).to(torch.uint8)
        self.field(packed, "qh")[:] = join_pairs((index >> 8).to(torch.uint8), 1)
        self.field(packed, "signs")[:] = mark.view(-1, GROUPS)
        return packed


class IQ3_XXS(SignedGrid):  # noqa: N801
    """`block_iq3_xxs`: 3.0625 bits per weight, `x = d*(0.5 + sc)/2 * point * sign`, 256 points of four weights, even signs.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-65 | qs | indices, one byte per four weights |
    | 66-97 | words | a 32-bit word per 32 weights, as in IQ2_XXS (in C the last third of `qs`) |
    """

    ggml_type = GGMLQuantizationType.IQ3_XXS
    fields = {"d": 2, "qs": 64, "words": 32}
    book, even, largest_mark = "IQ3_XXS", True, 127

    def unpack(self, blocks: Tensor) -> LatticeCodes:
        """See `LatticeGrid.unpack`."""
        signs, sub_scale = _split_words(self.field(blocks, "words").view(-1, 8, 4))
        scale = self.half(blocks, "d") * (0.5 + sub_scale.view(-1, 8)) * 0.5
        return LatticeCodes(self.field(blocks, "qs").int().view(-1, 2), signs, _per_group(scale))

    def pack(self, blocks: Tensor, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.pack`."""
        packed = blocks.clone()
        self.field(packed, "qs")[:] = index.view(-1, 64).to(torch.uint8)
        words = self.field(packed, "words")
        words[:] = _join_words(words.view(-1, 8, 4), mark).view(-1, 32)
        return packed


class IQ3_S(SignedGrid):  # noqa: N801
    """`block_iq3_s`: 3.4375 bits per weight, `x = d*(1 + 2*sc) * point * sign`, 512 points of four weights, free signs.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-65 | qs | low eight bits of the indices, one byte per four weights |
    | 66-73 | qh | ninth bits: byte i = `HGFEDCBA`, A-H = points 8i to 8i + 7 |
    | 74-105 | signs | sign bits, one byte per group |
    | 106-109 | scales | 4-bit scales of 32 weights each, low nibble first |
    """

    ggml_type = GGMLQuantizationType.IQ3_S
    fields = {"d": 2, "qs": 64, "qh": 8, "signs": 32, "scales": 4}
    book, even, largest_mark = "IQ3_S", False, 255

    def unpack(self, blocks: Tensor) -> LatticeCodes:
        """See `LatticeGrid.unpack`."""
        index = self.field(blocks, "qs").int() | (split_bits(self.field(blocks, "qh")).int() << 8)
        scale = self.half(blocks, "d") * (1.0 + 2.0 * split_nibbles(self.field(blocks, "scales"), 1))
        return LatticeCodes(index.view(-1, 2), self.field(blocks, "signs").reshape(-1), _per_group(scale))

    def pack(self, blocks: Tensor, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.pack`."""
        packed = blocks.clone()
        index = index.view(-1, 64)
        self.field(packed, "qs")[:] = (index & 255).to(torch.uint8)
        self.field(packed, "qh")[:] = join_bits((index >> 8).to(torch.uint8))
        self.field(packed, "signs")[:] = mark.view(-1, GROUPS)
        return packed


class IQ1_S(ShiftGrid):  # noqa: N801
    """`block_iq1_s`: 1.5625 bits per weight, `x = d*(2*sc + 1) * (point + shift)`, 2048 points.

    | bytes | field | meaning |
    |---|---|---|
    | 0-1 | d | fp16 scale of the scales |
    | 2-33 | qs | low eight bits of the indices, one byte per group |
    | 34-49 | qh | a little-endian 16-bit word per 32 weights: `TSSSDDDC CCBBBAAA` |

    A-D = high three bits of the four groups' indices, S = 3-bit scale `sc`, T = the shift is -1/8 instead of +1/8. T serves
    32 weights, as a scale does, so it is not a code: no flip changes it.
    """

    ggml_type = GGMLQuantizationType.IQ1_S
    fields = {"d": 2, "qs": 32, "qh": 16}
    largest_mark = 0

    def unpack(self, blocks: Tensor) -> LatticeCodes:
        """See `LatticeGrid.unpack`."""
        words = _words16(self.field(blocks, "qh"))
        high = (words.unsqueeze(2) >> _steps(4, 3, blocks.device)) & 7
        index = self.field(blocks, "qs").int() | (high.view(-1, GROUPS) << 8)
        scale = self.half(blocks, "d") * (2.0 * ((words >> 12) & 7) + 1.0)
        shift = self.delta - 2.0 * self.delta * (words >> 15)
        mark = torch.zeros(index.numel(), dtype=torch.uint8, device=blocks.device)
        return LatticeCodes(index.view(-1, 1), mark, _per_group(scale), _per_group(shift))

    def pack(self, blocks: Tensor, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.pack`."""
        packed = blocks.clone()
        index = index.view(-1, GROUPS)
        self.field(packed, "qs")[:] = (index & 255).to(torch.uint8)
        high = ((index >> 8).view(-1, 8, 4) << _steps(4, 3, blocks.device)).sum(2, dtype=torch.int32)
        words = (_words16(self.field(packed, "qh")) & 0xF000) | high
        self.field(packed, "qh")[:] = words.view(torch.uint8).view(-1, 8, 4)[:, :, :2].reshape(-1, 16)
        return packed

    def vectors(self, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.vectors`."""
        return self.points(index)

    def nearest(self, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `LatticeGrid.nearest`."""
        found = code_book(self.book, target.device).nearest(target, weight)
        return found.view(-1, 1), torch.zeros(len(target), dtype=torch.uint8, device=target.device)


class IQ1_M(ShiftGrid):  # noqa: N801
    """`block_iq1_m`: 1.75 bits per weight, `x = d*(2*sc + 1) * (point + shift)`, 2048 points.

    | bytes | field | meaning |
    |---|---|---|
    | 0-31 | qs | low eight bits of the indices, one byte per group |
    | 32-47 | qh | byte i = `TBBBSAAA`: A, B = high three bits of groups 2i and 2i + 1; S, T = their shift is -1/8 |
    | 48-55 | scales | four little-endian 16-bit words: `ddddDDDC CCBBBAAA`, A-D = 3-bit scales `sc` of 16 weights each |

    The four `dddd` of the words, first word lowest, are the bits of the fp16 scale `d`. The shift belongs to one group, so
    here it is part of the code.
    """

    ggml_type = GGMLQuantizationType.IQ1_M
    fields = {"qs": 32, "qh": 16, "scales": 8}
    largest_mark = 1

    def unpack(self, blocks: Tensor) -> LatticeCodes:
        """See `LatticeGrid.unpack`."""
        nibbles = split_nibbles(self.field(blocks, "qh"), 1)
        index = self.field(blocks, "qs").int() | ((nibbles & 7).int() << 8)
        words = _words16(self.field(blocks, "scales"))
        bits = ((words >> 12) << _steps(4, 4, blocks.device)).sum(1, dtype=torch.int32)
        d = bits.view(-1, 1).view(torch.int16)[:, :1].contiguous().view(torch.float16).float()
        scale = d * (2.0 * ((words.unsqueeze(2) >> _steps(4, 3, blocks.device)) & 7) + 1.0).view(-1, 16)
        return LatticeCodes(index.view(-1, 1), (nibbles >> 3).view(-1), _per_group(scale))

    def pack(self, blocks: Tensor, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.pack`."""
        packed = blocks.clone()
        index = index.view(-1, GROUPS)
        self.field(packed, "qs")[:] = (index & 255).to(torch.uint8)
        nibbles = (index >> 8).to(torch.uint8) | (mark.view(-1, GROUPS) << 3)
        self.field(packed, "qh")[:] = join_nibbles(nibbles, 1)
        return packed

    def vectors(self, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.vectors`."""
        return self.points(index).add_((self.delta - 2.0 * self.delta * mark).unsqueeze(1))

    def nearest(self, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `LatticeGrid.nearest`."""
        found = code_book(self.book, target.device).nearest(target, weight, tilt=self.delta).view(-1, 1)
        left = target - self.points(found)
        total = left.sum(1) if weight is None else (left * weight).sum(1)
        return found, (total < 0).to(torch.uint8)


def _per_group(values: Tensor) -> Tensor:
    """Repeat values of `[n_blocks, k]`, k dividing 32, so that there is one per group: `[n_groups, 1]`."""
    return values.unsqueeze(2).expand(-1, -1, GROUPS // values.shape[1]).reshape(-1, 1)


def _sixteenths(grid: Grid, blocks: Tensor) -> Tensor:
    """Scales of IQ2_XS and IQ2_S, `d*(0.5 + sc)/4` with a nibble per 16 weights: f32 `[n_groups, 1]`."""
    nibbles = split_nibbles(grid.field(blocks, "scales"), 1)
    return _per_group(grid.half(blocks, "d") * (0.5 + nibbles) * 0.25)


def _steps(count: int, width: int, device: torch.device) -> Tensor:
    """int32 `[count]`: 0, width, 2*width, ..."""
    return torch.arange(0, count * width, width, dtype=torch.int32, device=device)


def _words16(field: Tensor) -> Tensor:
    """Little-endian 16-bit words: uint8 `[n, 2k]` -> int32 `[n, k]`, 0..65535."""
    return field.contiguous().view(torch.int16).int() & 0xFFFF


def _words32(words: Tensor) -> Tensor:
    """Little-endian 32-bit words: uint8 `[n, 8, 4]` -> int32 `[8n, 1]`; a copy, since the bytes need not be aligned."""
    return words.clone(memory_format=torch.contiguous_format).view(-1, 4).view(torch.int32)


def _split_words(words: Tensor) -> tuple[Tensor, Tensor]:
    """The words of IQ2_XXS: uint8 `[n, 8, 4]` -> sign patterns uint8 `[n_groups]`, 4-bit scales f32 `[n * 8]`."""
    numbers = _words32(words)
    stored = (numbers >> _steps(4, 7, words.device)) & 127
    return _sign_patterns(words.device).index_select(0, stored.view(-1)), ((numbers >> 28) & 15).view(-1).float()


def _join_words(words: Tensor, signs: Tensor) -> Tensor:
    """`words`, uint8 `[n, 8, 4]`, with the sign bits replaced by those of `signs`, uint8 `[n_groups]`."""
    scales = _words32(words) & ~0x0FFFFFFF
    bits = ((signs & 127).int().view(-1, 4) << _steps(4, 7, words.device)).sum(1, keepdim=True, dtype=torch.int32)
    return (scales | bits).view(torch.uint8).view(words.shape)


@functools.cache
def _sign_patterns(device: torch.device) -> Tensor:
    """uint8 `[128]`: the eight sign bits for seven stored ones; the eighth makes their number even. From gguf."""
    return torch.from_numpy(np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8).copy()).to(device)
