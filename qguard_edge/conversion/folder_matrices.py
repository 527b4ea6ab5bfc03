"""What learned rounding rounds when the output is a folder for bitsandbytes: its matrices, with bitsandbytes' own scales.

The checkpoint's names are those of the torch model, so nothing has to be searched: a matrix is one parameter, transposed
where the model stores it input-first. NF4 and FP4 cut a matrix into blocks of 64 in storage order; where a row is no
multiple of that, the two values of each weight are put back into the matrix's own shape for the model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from convert.hashes import sha256_of
from convert.hf.rowmap import RowSource
from qguard_edge.conversion.opened_folder import OpenedFolder
from qguard_edge.learned.matrices import Target
from qguard_edge.learned.parts import FlipGeometry, Matrix, MatrixPart, MatrixParts, geometry_of
from qguard_edge.rounding.bnb import quantized
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

    def parts(self, parameters: Mapping[str, Tensor], defense: str) -> MatrixParts:
        """See `Target.parts`."""
        parts: list[MatrixPart] = []
        unmapped: list[Matrix] = []
        for matrix in self.matrices:
            if matrix.name not in parameters:
                unmapped.append(matrix)
                continue
            order = np.arange(matrix.rows)
            source = RowSource(matrix.name, matrix.transposed, order, order)
            parts.append(MatrixPart(matrix, torch.arange(matrix.rows), source, partial(self.geometry, matrix)))
        return MatrixParts(tuple(parts), tuple(unmapped))

    def geometry(self, matrix: Matrix) -> FlipGeometry:
        """See `Target.geometry`."""
        value = self.read(matrix.name)
        assert isinstance(matrix, FolderMatrix)
        weights = (value.t() if matrix.transposed else value).contiguous()
        grid = bnb_grid(self.kind, matrix.columns)
        with torch.inference_mode():
            blocks, _ = quantized(grid, weights, self.double_quant)
            found, _ = geometry_of(grid, blocks, grid.as_rows(weights))
        shape = (matrix.rows, matrix.columns)
        # Out of inference mode, so that autograd may use them; without the zeros that fill up the last block.
        cut = [x.reshape(-1)[: weights.numel()].reshape(shape).clone() for x in (found.value, found.delta, found.ratio)]
        return FlipGeometry(cut[0], cut[1], cut[2], found.energy)

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
