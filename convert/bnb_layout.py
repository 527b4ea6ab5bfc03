"""How transformers stores a matrix that bitsandbytes has quantized: names, dtypes and shapes of the tensors in the file.

For a Linear `P` with a weight of N rows and K columns (bitsandbytes 0.50, `QuantState.as_dict`, and transformers'
`quantizer_bnb_4bit.py` and `quantizer_bnb_8bit.py`):

| NF4, FP4 | |
|---|---|
| `P.weight` | uint8 `[ceil(N*K/2), 1]`: two codes per byte |
| `P.weight.absmax` | f32 `[blocks]`; uint8 with double quantization |
| `P.weight.quant_map` | f32 `[16]`: the code book |
| `P.weight.quant_state.bitsandbytes__nf4` (or `fp4`) | uint8: JSON with block size, shape and dtype of the original |
| `P.weight.nested_absmax`, `P.weight.nested_quant_map` | f32 `[blocks / 256]`, f32 `[256]`: double quantization only |

| INT8 | |
|---|---|
| `P.weight` | int8 `[N, K]` |
| `P.SCB` | f32 `[N]`: the largest magnitude of each row |
| `P.weight_format` | uint8, 0: stored by rows |

These are written from the grids' blocks directly: a module that has run on a CPU holds rounded scales (bitsandbytes repacks
it for AVX512-BF16), so nothing here ever passes through one.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quant_grids.bnb import BLOCK, BnbGrid, FourBitGrid
from quant_grids.bnb_scales import NESTED_BLOCK, NestedScales, dynamic_map

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def stored_tensors(
    name: str, grid: BnbGrid, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype, nested: NestedScales | None = None
) -> dict[str, Tensor]:
    """The tensors that stand for one matrix in the file.

    Args:
        name: of the weight, such as `model.layers.0.mlp.up_proj.weight`.
        grid: the format.
        blocks: uint8 `[n_blocks, type_size]`.
        shape: rows and columns.
        dtype: of the original; bitsandbytes dequantizes to it.
        nested: compressed scales, for double quantization.
    """
    codes = grid.field(blocks, "qs").reshape(-1)
    if not isinstance(grid, FourBitGrid):
        module = name.removesuffix("weight")
        return {
            name: codes.view(torch.int8).view(shape).clone(),
            f"{module}SCB": grid.scales(blocks),
            f"{module}weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    state: dict[str, Any] = {
        "quant_type": grid.kind_name,
        "blocksize": BLOCK,
        "dtype": DTYPE_NAMES[dtype],
        "shape": list(shape),
    }
    made = {
        name: codes[: -(-shape[0] * shape[1] // 2)].clone().unsqueeze(1),
        f"{name}.absmax": grid.scales(blocks) if nested is None else nested.codes,
        f"{name}.quant_map": torch.tensor(grid.code_book, dtype=torch.float32),
    }
    if nested is not None:
        made[f"{name}.nested_absmax"] = nested.largest
        made[f"{name}.nested_quant_map"] = dynamic_map().clone()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset}
    raw = json.dumps(state).encode()
    made[f"{name}.quant_state.bitsandbytes__{grid.kind_name}"] = torch.tensor(list(raw), dtype=torch.uint8)
    return made


def stored_bytes(kind: str, shape: tuple[int, int], double_quant: bool) -> int:
    """Bytes of the tensors that stand for one matrix, the code books and the JSON left out."""
    rows, columns = shape
    if kind == "int8":
        return rows * columns + 4 * rows
    blocks = -(-rows * columns // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) if double_quant else 4 * blocks
    return -(-rows * columns // 2) + scales


def quantization_config(
    kind: str, *, compute: torch.dtype, double_quant: bool, skip: Sequence[str] | None
) -> Mapping[str, Any]:
    """`quantization_config` of config.json.

    Args:
        kind: nf4, fp4 or int8.
        compute: what matrices are multiplied in; the model's own type.
        double_quant: whether scales are compressed.
        skip: modules that stay as they are, as transformers matches them; None: those that it leaves out by itself.
    """
    four = kind != "int8"
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_compute_dtype": DTYPE_NAMES[compute],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind if four else "fp4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skip is None else list(skip),
        "llm_int8_threshold": 6.0,
    }
