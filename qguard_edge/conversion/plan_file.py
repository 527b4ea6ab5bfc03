"""The rounding plan as a file: made where the model can run, applied where only the plain GGUF is.

A plan says for every weight of every protected tensor whether its code stays or moves, and which way. It is a safetensors
file with two tensors per GGUF tensor, and one JSON header:

    NAME.moved   uint8 [rows, ceil(columns / 8)]   one bit per weight, most significant first: the code moves
    NAME.up      uint8 [ceil(moved / 8)]           one bit per moved code, in storage order: 1 up, 0 down
    NAME.further uint8 [moved]                     levels beyond the first; left out where no code moves further

So a plan needs neither the base nor torch's model to be applied, only the plain file it was made for, which the header names
by its SHA-256. Formats whose codes are shared by several weights have no such plan.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from convert.atomic import atomic_path
from convert.gguf_file import GgufFile, TensorInfo
from convert.hashes import sha256_of
from convert.patch import GgufPatch
from convert.reading import require_file
from convert.tensor_io import RowSlice, open_reader, row_slices
from qguard_edge.progress import NoProgress, Progress
from quant_grids import GRIDS
from quant_grids.base import ScalarGrid
from quant_grids.errors import QGuardError

FORMAT = "qguard-plan-2"
OLD_FORMAT = "qguard-plan-1"  # names the plain file `reference`; still read
Bytes = npt.NDArray[np.uint8]


class PlanError(QGuardError):
    """The plan cannot be read, or does not belong to this plain file."""


class PlanRecorder:
    """A sink for `qguard_edge.rounding.gguf.harden`: keeps the change of each code instead of writing the new blocks.

    Args:
        plain: what the plan is for.
    """

    def __init__(self, plain: GgufFile) -> None:
        self._reader_context = open_reader(plain.path)
        self._reader = self._reader_context.__enter__()
        self._changes: dict[str, Tensor] = {}

    def close(self) -> None:
        """Close the plain file."""
        self._reader_context.__exit__(None, None, None)

    def __call__(self, tensor: TensorInfo, row: int, blocks: Tensor) -> None:
        """See `qguard_edge.rounding.gguf.Sink`.

        Raises:
            PlanError: a code moved further than a plan can say, or the type has no code per weight.
        """
        grid = _scalar(tensor)
        rows = len(blocks) * grid.block_size // tensor.columns
        before = self._reader.blocks(tensor, RowSlice(0, row, row + rows))
        change = grid.unpack(blocks.cpu()).codes.short() - grid.unpack(before).codes.short()
        if change.abs().amax() > 127:
            raise PlanError(
                f"{tensor.name!r}: a code moves by more than 127 levels; such a change cannot be put into a plan"
            )
        table = self._changes.setdefault(tensor.name, torch.zeros((tensor.rows, tensor.columns), dtype=torch.int8))
        table[row : row + rows] = change.view(rows, tensor.columns).to(torch.int8)

    def tensors(self) -> dict[str, Bytes]:
        """What goes into the file."""
        packed: dict[str, Bytes] = {}
        for name, change in self._changes.items():
            moved = change.numpy() != 0
            packed[f"{name}.moved"] = np.packbits(moved, axis=1)
            steps = change.numpy()[moved]
            packed[f"{name}.up"] = np.packbits(steps > 0)
            if steps.size and int(np.abs(steps.astype(np.int16)).max()) > 1:
                packed[f"{name}.further"] = (np.abs(steps.astype(np.int16)) - 1).astype(np.uint8)
        return packed


@dataclass(frozen=True)
class Plan:
    """A plan that was read.

    Attributes:
        header: what was decided and how: see `qguard_edge.conversion.outputs.plan`.
        path: of the file.
    """

    header: Mapping[str, Any]
    path: Path

    def change(self, tensor: TensorInfo) -> Tensor:
        """int16 `[rows, columns]`, how many levels each code moves, up or down.

        Raises:
            PlanError: the bits do not fit the tensor.
        """
        try:
            with safe_open(self.path, "np") as file:
                moved_bits: Bytes = file.get_tensor(f"{tensor.name}.moved")
                up_bits: Bytes = file.get_tensor(f"{tensor.name}.up")
                further = None
                if f"{tensor.name}.further" in file.keys():  # noqa: SIM118 - not a mapping
                    further = file.get_tensor(f"{tensor.name}.further")
        except (OSError, SafetensorError) as error:
            raise PlanError(f"{self.path.name}: no plan for {tensor.name!r} ({error})") from error
        width = -(-tensor.columns // 8)
        if moved_bits.shape != (tensor.rows, width) or moved_bits.dtype != np.uint8 or up_bits.dtype != np.uint8:
            raise PlanError(f"{self.path.name}: {tensor.name!r} is {list(moved_bits.shape)}, not {[tensor.rows, width]}")
        moved = np.unpackbits(moved_bits, axis=1, count=tensor.columns).astype(bool)
        count = int(moved.sum())
        if up_bits.shape != (-(-count // 8),):
            raise PlanError(
                f"{self.path.name}: {tensor.name!r} moves {count} codes but names {up_bits.size} bytes of directions"
            )
        if further is not None and (further.shape != (count,) or further.dtype != np.uint8):
            raise PlanError(f"{self.path.name}: {tensor.name!r} moves {count} codes but says of {further.size} how far")
        change = np.zeros(moved.shape, np.int16)
        change[moved] = np.where(np.unpackbits(up_bits, count=count), 1, -1)
        if further is not None:
            change[moved] *= further.astype(np.int16) + 1
        return torch.from_numpy(change)


def write_plan(path: Path, tensors: Mapping[str, Bytes], header: Mapping[str, Any]) -> None:
    """Write a plan; it appears whole or not at all."""
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, {"format": FORMAT, "plan": json.dumps(header)})
        except SafetensorError as error:
            raise PlanError(f"{path.name} cannot be written: {error}") from error
        _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Put the entries of a safetensors file's metadata in order: the library writes them as its hash map has them, by chance."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length
        file.seek(8)
        file.write(text)


def read_plan(path: Path) -> Plan:
    """Read a plan's header.

    Raises:
        PlanError: it is not a plan.
    """
    try:
        require_file(path)
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{path.name} cannot be read as a rounding plan: {error}") from error
    if header.get("format") not in (FORMAT, OLD_FORMAT):
        raise PlanError(f"{path.name} is no rounding plan of the kind {FORMAT}; make one with `qguard-edge plan`")
    try:
        plan = json.loads(header.get("plan", ""))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path.name}: the header is not JSON") from error
    if isinstance(plan, dict) and header["format"] == OLD_FORMAT:
        plan["plain_sha256"] = plan.pop("reference_sha256", None)
    if not isinstance(plan, dict) or not isinstance(plan.get("plain_sha256"), str):
        raise PlanError(f"{path.name}: the header names no plain file")
    plan["tensors"] = [name.removesuffix(".moved") for name in names if name.endswith(".moved")]
    return Plan(plan, path)


def apply_plan(plan: Plan, plain: GgufFile, out: Path, progress: Progress | None = None) -> dict[str, int]:
    """Write a copy of the plain file with the plan's codes to `out`, a new file.

    Returns:
        Codes changed, per tensor.

    Raises:
        PlanError: the plan was made for another plain file, or does not fit it.
    """
    progress = progress or NoProgress()
    if sha256_of([plain.path]) != plan.header["plain_sha256"]:
        raise PlanError(
            f"{plan.path.name} was not made for {plain.path.name} (another SHA-256); give the plain file that "
            "`qguard-edge plan` was given"
        )
    unknown = [name for name in plan.header["tensors"] if name not in plain.tensors]
    if unknown:
        raise PlanError(f"{plan.path.name} has a plan for {unknown[0]!r}, which {plain.path.name} does not have")
    metadata = plan.header.get("metadata")
    if not isinstance(metadata, dict) or not all(isinstance(v, bool | int | float | str) for v in metadata.values()):
        raise PlanError(f"{plan.path.name}: the header has no metadata for the file")
    tensors = [plain.tensors[name] for name in plan.header["tensors"]]
    progress.stage("Applying the plan", len(tensors), "tensors")
    counts = {}
    patch = GgufPatch(plain, out, metadata)
    try:
        with open_reader(plain.path) as reader:
            for tensor in tensors:
                grid, change = _scalar(tensor), plan.change(tensor)
                for part in row_slices(tensor):
                    before = reader.blocks(tensor, part)
                    patch.write_rows(tensor, part.start, _moved(grid, before, change[part.start : part.stop], tensor.name))
                counts[tensor.name] = int(torch.count_nonzero(change))
                progress.advance(1, tensor.name)
        patch.copy_rest(tensor.name for tensor in tensors)
    finally:
        patch.close()
    return counts


def _moved(grid: ScalarGrid, blocks: Tensor, change: Tensor, name: str) -> Tensor:
    codes = grid.unpack(blocks).codes
    moved = codes.short() + change.reshape(codes.shape).short()
    if int(moved.min()) < 0 or int(moved.max()) >= len(grid.levels):
        raise PlanError(f"the plan moves a code of {name!r} out of the range of {grid.name}")
    return grid.pack(blocks, moved.to(torch.uint8))


def _scalar(tensor: TensorInfo) -> ScalarGrid:
    grid = GRIDS.get(tensor.ggml_type)
    if not isinstance(grid, ScalarGrid):
        raise PlanError(
            f"{tensor.name!r} is {tensor.ggml_type.name}, which has no code per weight: convert in one go instead"
        )
    return grid
