"""Learning over several GPUs: decoder blocks are dealt out in order, accelerate carries activations from one to the next.

Only the forward and backward pass use more than one device. A part's rounding variables live where its parameter is.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qguard_edge.runtimes.hf import decoder_blocks
from quant_grids.errors import UnsupportedError


def learning_devices(device: torch.device) -> tuple[torch.device, ...]:
    """All GPUs if a GPU is given without a number, else the device itself."""
    several = str(device) == "cuda" and torch.cuda.device_count() > 1
    return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count())) if several else (device,)


def place(model: Any, devices: Sequence[torch.device]) -> None:
    """Move a model to a device, or spread its decoder blocks over several. In the latter case its parameters are replaced.

    Raises:
        UnsupportedError: several devices, and accelerate is not installed.
    """
    if len(devices) == 1:
        model.to(devices[0])
        return
    try:
        from accelerate import dispatch_model
    except ImportError as error:
        raise UnsupportedError(
            "learning on several GPUs needs accelerate: pip install accelerate, or show one GPU with CUDA_VISIBLE_DEVICES"
        ) from error
    dispatch_model(model, dict(device_map(model, devices)), devices[0], force_hooks=True)


def device_map(model: Any, devices: Sequence[torch.device]) -> Iterator[tuple[str, torch.device]]:
    """Where each module goes: blocks in equal runs, an output matrix of its own to the last device, the rest to the first."""
    blocks = decoder_blocks(model)
    count = len(blocks)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.device]]:
        for name, child in module.named_children():
            if child is blocks:
                for index in range(count):
                    yield f"{prefix}{name}.{index}", devices[index * len(devices) // count]
            elif any(inner is blocks for inner in child.modules()):
                yield from walk(child, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", devices[-1 if child is head and not tied else 0]

    yield from walk(model, "")
