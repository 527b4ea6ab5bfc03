"""One decoder block at a time: the inputs of each block are kept, so that no other block needs to be in the device's memory.

    capture:  run the model on the CPU once up to its first block (hidden states of all texts), and once over all blocks on one
              batch (what else each block is called with: masks, positions)
    stream:   block 0 on the kept states -> states of block 1 -> ...

All texts are cut to rows of one length, so that masks and positions of one batch fit every other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qguard_edge.learned.calibration import CalibrationError
from qguard_edge.learned.parts import MatrixPart
from qguard_edge.runtimes.devices import autocast
from qguard_edge.runtimes.hf import HfModel, decoder_blocks


class _FirstBlockReached(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Carries nothing; the hook has kept the states."""


@dataclass(frozen=True)
class BlockInputs:
    """What the decoder blocks are called with.

    Attributes:
        states: f32 `[batches, B, T, width]`, inputs of the first block.
        arguments: per block, the keyword arguments of one batch; tensors of them fit every batch.
    """

    states: Tensor
    arguments: tuple[Mapping[str, Any], ...]


def rows_of(samples: Sequence[Sequence[int]], length: int, batch: int) -> Tensor:
    """Texts one after the other, cut into rows of one length: int64 `[batches, B, length]`.

    Raises:
        CalibrationError: not even one row.
    """
    flat = [token for sample in samples for token in sample]
    length = min(length, len(flat))
    rows = len(flat) // length
    batch = min(batch, rows)
    if length < 2 or batch < 1:
        raise CalibrationError("the calibration text is too short to learn on; give more of it")
    count = rows // batch
    return torch.tensor(flat[: count * batch * length]).view(count, batch, length)


def prefix_of(model: Any, block: nn.Module) -> str:
    """Name of a block's parameters up to the block, for instance `model.layers.3.`."""
    return str(next(name for name, module in model.named_modules() if module is block)) + "."


def parts_of_block(parts: Sequence[MatrixPart], prefix: str) -> list[tuple[int, MatrixPart]]:
    """The parts inside a block, with their indices; their parameters are named as within the block."""
    found = []
    for index, part in enumerate(parts):
        name = part.source.parameter
        if name.startswith(prefix):
            found.append((index, replace(part, source=replace(part.source, parameter=name.removeprefix(prefix)))))
    return found


@torch.no_grad()
def capture(loaded: HfModel, rows: Tensor) -> BlockInputs:
    """The inputs of the first block on all rows, and the other arguments of every block."""
    blocks = decoder_blocks(loaded.model)
    arguments: dict[int, Mapping[str, Any]] = {}
    states: list[Tensor] = []

    def keep_arguments(index: int) -> Any:
        def hook(_module: nn.Module, _given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            arguments[index] = {k: v for k, v in keywords.items() if k not in ("hidden_states", "past_key_values")}

        return hook

    def keep_states(_module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states.append((given[0] if given else keywords["hidden_states"]).float())
        raise _FirstBlockReached

    device = loaded.model.device
    handles = [block.register_forward_pre_hook(keep_arguments(i), with_kwargs=True) for i, block in enumerate(blocks)]
    with autocast(device):
        loaded.model(input_ids=rows[0].to(device), use_cache=False)
    for handle in handles:
        handle.remove()
    handle = blocks[0].register_forward_pre_hook(keep_states, with_kwargs=True)
    for batch in rows:
        try:
            with autocast(device):
                loaded.model(input_ids=batch.to(device), use_cache=False)
        except _FirstBlockReached:
            pass
    handle.remove()
    return BlockInputs(torch.stack(states).cpu(), tuple(arguments[i] for i in range(len(blocks))))


def run_block(block: nn.Module, states: Tensor, arguments: Mapping[str, Any], device: torch.device) -> Tensor:
    """Output of a block on one batch: f32 `[B, T, width]`."""
    with autocast(device):
        made = block(states.to(device), **{name: _move(value, device) for name, value in arguments.items()})
    out: Tensor = made[0] if isinstance(made, tuple) else made
    return out.float()


@torch.no_grad()
def stream(block: nn.Module, states: Tensor, arguments: Mapping[str, Any], device: torch.device) -> Tensor:
    """Outputs of a block on all batches, f32 `[batches, B, T, width]` on the CPU."""
    return torch.stack([run_block(block, batch, arguments, device).cpu() for batch in states])


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    return value


@torch.no_grad()
def gram_matrices(
    block: nn.Module, names: Sequence[str], states: Tensor, arguments: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums of `x x^T` over the inputs x of a block's linear layers, and the block's outputs.

    Args:
        block: on `device`.
        names: parameters within the block; those that are not the weight of a linear layer get no entry.
        states: f32 `[batches, B, T, width]`.
        arguments: of the block.
        device: where it runs.

    Returns:
        f32 `[columns, columns]` per parameter, divided by the number of tokens, and the outputs on the CPU.
    """
    modules = dict(block.named_modules())
    grams: dict[str, Tensor] = {}
    count = states.shape[0] * states.shape[1] * states.shape[2]

    def hook(name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            with torch.autocast(flat.device.type, enabled=False):  # sums over thousands of tokens need all their bits
                product = flat.T @ flat
            grams[name] = grams[name].add_(product) if name in grams else product

        return add

    handles = []
    for name in names:
        owner = modules.get(name.removesuffix(".weight"))
        if owner is not None and (isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"):
            handles.append(owner.register_forward_pre_hook(hook(name)))
    outputs = stream(block, states, arguments, device)
    for handle in handles:
        handle.remove()
    return {name: gram / count for name, gram in grams.items()}, outputs


def numbered_blocks(model: Any) -> Iterator[tuple[int, nn.Module, str]]:
    """The decoder blocks in order, with the prefix of their parameters."""
    for index, block in enumerate(decoder_blocks(model)):
        yield index, block, prefix_of(model, block)


def block_grams(
    loaded: HfModel, parts: Sequence[MatrixPart], inputs: BlockInputs, device: torch.device, *, resident: bool
) -> Iterator[list[tuple[int, Tensor | None]]]:
    """Block by block, the index of each part in it and what `gram_matrices` gives for its inputs in full precision.

    Args:
        loaded: the full-precision model.
        parts: what is quantized.
        inputs: of the blocks.
        device: where each block runs.
        resident: whether blocks stay there; else they go back to the CPU one by one.
    """
    states = inputs.states
    for number, block, prefix in numbered_blocks(loaded.model):
        mine = parts_of_block(parts, prefix)
        block.to(device)
        names = [part.source.parameter for _, part in mine]
        grams, states = gram_matrices(block, names, states, inputs.arguments[number], device)
        yield [(index, grams.get(part.source.parameter)) for index, part in mine]
        if not resident:
            block.to("cpu")
