"""bitsandbytes itself, as the judge of what we wrote; its only home outside the lab.

Writing a checkpoint needs no bitsandbytes. Saying that the *unmodified* quantizer rounds a moved model to the planned codes
does: here it really quantizes, matrix by matrix, with the calls that `from_pretrained(load_in_4bit=True)` and
`load_in_8bit=True` make (a test compares with those).
"""

import logging

import torch
from torch import Tensor

from quant_grids.bnb import BLOCK, BnbGrid, FourBitGrid
from quant_grids.errors import QGuardError


class BnbMissingError(QGuardError):
    """bitsandbytes is not installed."""


def require_bitsandbytes() -> None:
    """Fail early; and keep its logger to errors, since it repeats advice on speed at every forward pass.

    Raises:
        BnbMissingError: it cannot be imported.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError) as error:
        raise BnbMissingError(
            "checking the result needs bitsandbytes: run pip install 'qguard-edge[bnb]', or pass --no-load-check"
        ) from error


def really_quantized(weights: Tensor, grid: BnbGrid) -> Tensor:
    """What bitsandbytes makes of a matrix, as blocks of the grid.

    Args:
        weights: `[rows, columns]` of f32, f16 or bf16, on the device whose kernels are to judge.
        grid: the format.

    Returns:
        uint8 `[n_blocks, type_size]`.
    """
    import bitsandbytes.functional as functional

    if isinstance(grid, FourBitGrid):
        packed, state = functional.quantize_4bit(weights.contiguous(), blocksize=BLOCK, quant_type=grid.kind_name)
        scales, codes = state.absmax, packed.view(-1)
    else:
        stored, scales, _ = functional.int8_vectorwise_quant(weights.half().contiguous())
        codes = stored.view(torch.uint8).view(-1)
    size = grid.type_size - 4
    blocks = torch.zeros(len(scales), grid.type_size, dtype=torch.uint8, device=weights.device)
    padded = torch.nn.functional.pad(codes, (0, len(scales) * size - len(codes)))
    grid.field(blocks, "qs")[:] = padded.view(-1, size)
    return grid.with_scales(blocks, scales.float())
