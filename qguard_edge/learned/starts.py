"""Where the rounding variables of each part start: `--quantguard-start`.

* `feedback` (default): error feedback per layer from the inputs it sees on the text, see `qguard_edge.learned.feedback`;
* `ortho`: the weight's place in its cell plus `ortho`'s random shift;
* `fraction`: the weight's place in its cell, which can be computed by anyone.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qguard_edge.defenses.base import SliceKey
from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.learned.blocks import block_grams, capture, rows_of
from qguard_edge.learned.feedback import start_from
from qguard_edge.learned.parts import FlipGeometry, MatrixPart
from qguard_edge.learned.settings import LearnTask
from qguard_edge.runtimes.devices import autocast
from qguard_edge.runtimes.hf import HfLoadError, HfModel, decoder_blocks

SHIFT_WIDTH = 0.5  # of the random shift; the attack `adaptive-feedback` uses it and does not succeed (docs/results.md)
ROWS = 8  # texts run at once


def shifted_ratio(geometry: FlipGeometry, name: str, seed: int) -> Tensor:
    """Each weight's place in its cell plus a random shift of its own: f32 `[rows, columns]` in [0, 1]."""
    shift = SliceKey(seed, name, 0).jitter(geometry.ratio.shape, torch.device("cpu")).mul_(SHIFT_WIDTH)
    return shift.mul_(geometry.delta != 0).add_(geometry.ratio).clamp_(0.0, 1.0)


def plain_start(part: MatrixPart, start: str, seed: int) -> Tensor:
    """f32 `[rows, columns]` for `ortho` and `fraction`; `feedback` without known inputs starts as `ortho` does."""
    if start == "fraction":
        return part.geometry().ratio.float().clone()
    return shifted_ratio(part.geometry(), part.name, seed)


def start_positions(
    loaded: HfModel,
    parts: Sequence[MatrixPart],
    samples: Sequence[Sequence[int]],
    options: QuantGuardOptions,
    task: LearnTask,
    *,
    resident: bool,
) -> list[Tensor]:
    """Start of every part, f32 `[rows, columns]` on the CPU, in the order of `parts`.

    Args:
        loaded: the full-precision model; not modified, but moved to the device if it is resident, else to the CPU.
        parts: what is quantized.
        samples: token ids to learn on.
        options: of QuantGuard.
        task: what is being converted.
        resident: whether the whole model fits the device; else one decoder block at a time is moved there.
    """
    loaded.model.to(task.device if resident else torch.device("cpu"))
    found: dict[int, Tensor] = {}
    if options.start == "feedback":
        try:
            decoder_blocks(loaded.model)
            found = _feedback(loaded, parts, samples, options, task, resident)
        except HfLoadError:
            task.progress.note("no list of decoder blocks was found: learning starts as with --quantguard-start ortho")
    return [found[i] if i in found else plain_start(part, options.start, task.seed) for i, part in enumerate(parts)]


def _feedback(
    loaded: HfModel,
    parts: Sequence[MatrixPart],
    samples: Sequence[Sequence[int]],
    options: QuantGuardOptions,
    task: LearnTask,
    resident: bool,
) -> dict[int, Tensor]:
    """Starts of the parts whose inputs are seen, block by block."""
    rows = rows_of(samples, task.calibration.seqlen, ROWS)
    inputs = capture(loaded, rows)
    parameters = dict(loaded.model.named_parameters())
    found: dict[int, Tensor] = {}
    task.progress.stage("Looking at what each layer is fed", len(inputs.arguments) + 1, "blocks")

    def add(index: int, gram: Tensor | None) -> None:
        if gram is None:
            return
        part = parts[index]
        geometry = part.geometry().to(task.device, torch.float32)
        weights = part.gather(parameters[part.source.parameter].detach()).to(task.device).float()
        generator = torch.Generator().manual_seed((task.seed * 1_000_003 + zlib.crc32(part.name.encode())) % 2**63)
        found[index] = start_from(geometry, weights, gram.to(task.device), options.alignment, generator).cpu()

    with torch.no_grad():
        for grams in block_grams(loaded, parts, inputs, task.device, resident=resident):
            for index, gram in grams:
                add(index, gram)
            task.progress.advance(1)
        head = _head(loaded.model)
        heads = [i for i, part in enumerate(parts) if parameters[part.source.parameter] is getattr(head, "weight", None)]
        if head is not None and heads:
            gram = _head_gram(loaded, head, rows if resident else rows[:1])
            for index in heads:
                add(index, gram)
        task.progress.advance(1)
    return found


def _head(model: Any) -> nn.Linear | None:
    """The output matrix, tied to the embedding or not."""
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def _head_gram(loaded: HfModel, head: nn.Linear, rows: Tensor) -> Tensor:
    """Mean of `x x^T` over the inputs of the output matrix, without computing its outputs: f32 `[width, width]`."""
    device = loaded.model.device
    total = torch.zeros(head.in_features, head.in_features, device=device)

    class _Seen(Exception):  # noqa: N818 - not an error: it ends a forward pass before the largest product
        pass

    def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        flat = given[0].reshape(-1, head.in_features).float()
        with torch.autocast(flat.device.type, enabled=False):
            total.addmm_(flat.T, flat)
        raise _Seen

    handle = head.register_forward_pre_hook(hook)
    try:
        for batch in rows:
            try:
                with autocast(device):
                    loaded.model(input_ids=batch.to(device), use_cache=False)
            except _Seen:
                pass
    finally:
        handle.remove()
    return total / rows.numel()
