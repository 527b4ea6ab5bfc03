"""What learned rounding rounds when the output is a folder for bitsandbytes: its matrices, with bitsandbytes' own scales.

The checkpoint's names are those of the torch model, so nothing has to be searched: a matrix is one parameter, transposed
where the model stores it input-first. NF4 and FP4 cut a matrix into blocks of 64 in storage order; where a row is no
multiple of that, the two values of each weight are put back into the matrix's own shape for the model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.cores import available_cores
from convert.hashes import sha256_of
from convert.hf.rowmap import RowSource
from convert.tensor_io import single_threaded_torch
from qguard_edge.conversion.opened_folder import OpenedFolder
from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.learned.matrices import Drawing, Drawn, Target
from qguard_edge.learned.parts import FlipGeometry, Matrix, MatrixPart, MatrixParts, geometry_of
from qguard_edge.rounding.bnb import harden_matrix, quantized
from quant_grids.bnb import bnb_grid


@dataclass(frozen=True)
class FolderMatrix:
    """A matrix of a checkpoint, rows being outputs of its layer; see `qguard_edge.learned.parts.Matrix`."""

    name: str
    rows: int
    columns: int
    transposed: bool


@dataclass(frozen=True)
class FolderTarget(Target):
    """Matrices of a folder.

    Attributes:
        opened: the folder.
        kind: nf4, fp4 or int8.
        double_quant: whether scales are compressed.
        read: a matrix by name as it will be quantized, in the checkpoint's orientation.
    """

    opened: OpenedFolder
    kind: str
    double_quant: bool
    read: Callable[[str], Tensor]

    @cached_property
    def matrices(self) -> tuple[FolderMatrix, ...]:
        """What bitsandbytes quantizes, in the order of the checkpoint."""
        found = []
        for tensor in self.opened.checkpoint.tensors.values():
            module = self.opened.module_of(tensor)
            if module is not None:
                transposed = self.opened.modules.transposed[module]
                rows, columns = tensor.shape[::-1] if transposed else tensor.shape
                found.append(FolderMatrix(tensor.name, rows, columns, transposed))
        return tuple(found)

    def parts(self, parameters: Mapping[str, Tensor], defense: str, drawn: Mapping[str, Drawn] | None = None) -> MatrixParts:
        """See `Target.parts`."""
        parts: list[MatrixPart] = []
        unmapped: list[Matrix] = []
        for matrix in self.matrices:
            if matrix.name not in parameters:
                unmapped.append(matrix)
                continue
            order = np.arange(matrix.rows)
            source = RowSource(matrix.name, matrix.transposed, order, order)
            start = drawn[matrix.name] if drawn is not None else None
            read = partial(self._geometry, matrix, start)
            parts.append(
                MatrixPart(matrix, torch.arange(matrix.rows), source, read, bnb_grid(self.kind, matrix.columns).name)
            )
        return MatrixParts(tuple(parts), tuple(unmapped))

    def geometry(self, matrix: Matrix) -> FlipGeometry:
        """See `Target.geometry`."""
        return self._geometry(matrix, None)

    def _weights(self, matrix: Matrix) -> Tensor:
        """A matrix as it will be quantized, outputs first."""
        value = self.read(matrix.name)
        assert isinstance(matrix, FolderMatrix)
        return (value.t() if matrix.transposed else value).contiguous()

    def _geometry(self, matrix: Matrix, drawn: Drawn | None) -> FlipGeometry:
        weights, grid = self._weights(matrix), bnb_grid(self.kind, matrix.columns)
        with torch.inference_mode():
            blocks, _ = quantized(grid, weights, self.double_quant)
            found, _ = geometry_of(grid, blocks, grid.as_rows(weights), None if drawn is None else drawn.blocks)

        def cut(values: Tensor) -> Tensor:
            """Out of inference mode, so that autograd may use them; without the zeros that fill up the last block."""
            return values.reshape(-1)[: weights.numel()].reshape(matrix.rows, matrix.columns).clone()

        return replace(
            found,
            value=cut(found.value),
            delta=cut(found.delta),
            ratio=cut(found.ratio),
            pull=None if found.pull is None else cut(found.pull),
        )

    def draw(self, rule: Defense[Any], how: Drawing) -> Mapping[str, Drawn]:
        """See `Target.draw`."""
        found = {}
        workers = 1 if how.device.type == "cuda" else how.threads or available_cores()
        with single_threaded_torch(), ThreadPoolExecutor(workers) as pool:
            for matrix in self.matrices:
                made = harden_matrix(
                    self._weights(matrix).to(how.device),
                    self.kind,
                    rule,
                    key=partial(SliceKey, how.seed, matrix.name),
                    pool=pool,
                    double_quant=self.double_quant,
                    inputs=how.inputs,
                )
                found[matrix.name] = Drawn(made.blocks.cpu(), made.bits)
        return found

    def flipped(self, matrix: Matrix, drawn: Drawn, chosen: Tensor) -> Tensor:
        """See `Target.flipped`."""
        grid = bnb_grid(self.kind, matrix.columns)
        with torch.inference_mode():
            rows = grid.as_rows(self._weights(matrix))
            taken = torch.zeros(rows.numel())
            taken[: chosen.numel()] = chosen.reshape(-1).float()
            made, _ = grid.apply(drawn.blocks, grid.flips(drawn.blocks, rows), taken.view(rows.shape))
        return made.clone()

    @cached_property
    def _weights_hash(self) -> str:
        return sha256_of(sorted({tensor.file for tensor in self.opened.checkpoint.tensors.values()}))

    def fingerprint(self) -> str:
        """See `Target.fingerprint`."""
        facts = [self._weights_hash, self.kind, self.double_quant, [matrix.name for matrix in self.matrices]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def model_key(self) -> str:
        """See `Target.model_key`."""
        return self._weights_hash
