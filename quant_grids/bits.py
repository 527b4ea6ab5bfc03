"""Bit shuffling shared by the block formats: nibbles, pairs of bits, bit planes, vectorised over blocks."""

import torch
from torch import Tensor


def split_nibbles(packed: Tensor, group: int) -> Tensor:
    """Codes of byte groups whose low nibbles come first.

    ggml stores a run of `2 * group` weights in `group` bytes: the low nibbles are weights 0..group-1, the high nibbles are
    weights group..2*group-1.

        byte i:  BBBBAAAA      A = weight i, B = weight i + group

    Args:
        packed: uint8 `[n, bytes]`, `bytes` a multiple of `group`.
        group: bytes per run.

    Returns:
        uint8 `[n, 2 * bytes]`, values 0..15.
    """
    runs = packed.view(len(packed), -1, group)
    return torch.stack((runs & 0x0F, runs >> 4), dim=2).view(len(packed), -1)


def join_nibbles(codes: Tensor, group: int) -> Tensor:
    """Inverse of `split_nibbles`: uint8 `[n, 2 * bytes]` with values 0..15 -> uint8 `[n, bytes]`."""
    runs = codes.reshape(len(codes), -1, 2, group)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).view(len(codes), -1)


def split_bits(packed: Tensor) -> Tensor:
    """Single bits in storage order, lowest bit of each byte first: uint8 `[n, bytes]` -> uint8 `[n, 8 * bytes]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).view(len(packed), -1)


def join_bits(bits: Tensor) -> Tensor:
    """Inverse of `split_bits`: uint8 `[n, 8 * bytes]` of 0 and 1 -> uint8 `[n, bytes]`."""
    planes = bits.reshape(len(bits), -1, 8)
    packed = planes[..., 0].clone()
    for i in range(1, 8):
        packed |= planes[..., i] << i
    return packed


def split_pairs(packed: Tensor, run: int) -> Tensor:
    """Codes of byte runs that hold four 2-bit values per byte, each pair of bits a run of its own.

        byte i:  DDCCBBAA      A = weight i, B = weight i + run, C = weight i + 2*run, D = weight i + 3*run

    Args:
        packed: uint8 `[n, bytes]`, `bytes` a multiple of `run`.
        run: bytes per run.

    Returns:
        uint8 `[n, 4 * bytes]`, values 0..3.
    """
    runs = packed.reshape(len(packed), -1, run)
    return torch.stack((runs & 3, (runs >> 2) & 3, (runs >> 4) & 3, runs >> 6), dim=2).view(len(packed), -1)


def join_pairs(codes: Tensor, run: int) -> Tensor:
    """Inverse of `split_pairs`: uint8 `[n, 4 * bytes]` with values 0..3 -> uint8 `[n, bytes]`."""
    runs = codes.reshape(len(codes), -1, 4, run)
    packed = runs[:, :, 0] | (runs[:, :, 1] << 2) | (runs[:, :, 2] << 4) | (runs[:, :, 3] << 6)
    return packed.view(len(codes), -1)


def split_planes(packed: Tensor) -> Tensor:
    """One bit per weight, bit k of byte i for weight `i + k * bytes`: uint8 `[n, bytes]` -> uint8 `[n, 8 * bytes]`."""
    high = packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device).view(1, 8, 1)
    return (high & 1).view(len(packed), -1)


def join_planes(bits: Tensor) -> Tensor:
    """Inverse of `split_planes`: uint8 `[n, 8 * bytes]` of 0 and 1 -> uint8 `[n, bytes]`."""
    planes = bits.view(len(bits), 8, -1)
    packed = planes[:, 0].clone()
    for i in range(1, 8):
        packed |= planes[:, i] << i
    return packed
