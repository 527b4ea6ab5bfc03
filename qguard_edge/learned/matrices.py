"""What learning rounds: the tensors of a GGUF, or the matrices of a folder. The engine needs nothing but this."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.hashes import sha256_of
from convert.tensor_io import open_reader, row_slices
from qguard_edge.defenses.base import Defense, Inputs
from qguard_edge.learned.parts import FlipGeometry, Matrix, MatrixParts, make_parts, require_scalar, tensor_geometry
from qguard_edge.rounding.gguf import WalkOptions, harden
from quant_grids import GRIDS


@dataclass(frozen=True)
class Drawn:
    """Codes of a matrix as error feedback drew them.

    Attributes:
        blocks: uint8 `[n_blocks, type_size]`, on the CPU.
        bits: entropy of the draws.
    """

    blocks: Tensor
    bits: float


@dataclass(frozen=True)
class Drawing:
    """How codes are drawn: what the walk over the matrices needs beside the rule.

    Attributes:
        seed: of the draws.
        inputs: Gram matrices of the matrices' inputs.
        threads: 0 for all cores.
        device: where the arithmetic runs.
    """

    seed: int
    inputs: Inputs | None
    threads: int
    device: torch.device


class Target(ABC):
    """Quantized matrices whose rounding can be chosen."""

    @abstractmethod
    def parts(self, parameters: Mapping[str, Tensor], defense: str, drawn: Mapping[str, Drawn] | None = None) -> MatrixParts:
        """Each matrix's rows in a torch model.

        Args:
            parameters: of the torch model, by name, each once.
            defense: for messages.
            drawn: codes to start from, by matrix; None: the plain ones.

        Raises:
            UnsupportedError: a matrix whose codes are shared by several weights.
        """

    @abstractmethod
    def geometry(self, matrix: Matrix) -> FlipGeometry:
        """The geometry of one whole matrix, of those that `parts` found in no parameter."""

    @abstractmethod
    def draw(self, rule: Defense[Any], how: Drawing) -> Mapping[str, Drawn]:
        """Round every matrix by a rule, the same that writing the output would do with it.

        Raises:
            UnsupportedError: a matrix whose codes are shared by several weights.
        """

    @abstractmethod
    def flipped(self, matrix: Matrix, drawn: Drawn, chosen: Tensor) -> Tensor:
        """Drawn codes with some flips (see `FlipGeometry`) taken: uint8 `[n_blocks, type_size]`.

        Args:
            matrix: one of this target's.
            drawn: its codes; not modified.
            chosen: bool `[rows, columns]`.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies what is rounded, plain file and format."""

    @abstractmethod
    def model_key(self) -> str:
        """Identifies the full-precision model: the cache of the text it writes."""


@dataclass(frozen=True)
class GgufTarget(Target):
    """Tensors of a GGUF.

    Attributes:
        base: full precision.
        plain: what llama.cpp wrote.
        tensors: of the plain file, to be hardened.
    """

    base: GgufModel
    plain: GgufFile
    tensors: tuple[TensorInfo, ...]

    def parts(self, parameters: Mapping[str, Tensor], defense: str, drawn: Mapping[str, Drawn] | None = None) -> MatrixParts:
        """See `Target.parts`."""
        require_scalar(self.tensors, defense)
        blocks = None if drawn is None else {name: one.blocks for name, one in drawn.items()}
        return make_parts(self.base, self.plain, self.tensors, parameters, blocks)

    def geometry(self, matrix: Matrix) -> FlipGeometry:
        """See `Target.geometry`."""
        return tensor_geometry(self.base, self.plain, self.plain.tensors[matrix.name])

    def draw(self, rule: Defense[Any], how: Drawing) -> Mapping[str, Drawn]:
        """See `Target.draw`."""
        require_scalar(self.tensors, "quantguard")
        made: dict[str, Tensor] = {}
        for tensor in self.tensors:
            grid = GRIDS[tensor.ggml_type]
            made[tensor.name] = torch.empty(tensor.n_weights // grid.block_size, grid.type_size, dtype=torch.uint8)

        def sink(tensor: TensorInfo, row: int, blocks: Tensor) -> None:
            first = row * (tensor.columns // GRIDS[tensor.ggml_type].block_size)
            made[tensor.name][first : first + len(blocks)] = blocks.cpu()

        options = WalkOptions(how.seed, how.threads, how.device, inputs=how.inputs)
        roundings = harden(self.base, self.plain, self.tensors, rule, options, sink=sink)
        return {rounding.name: Drawn(made[rounding.name], rounding.bits) for rounding in roundings}

    def flipped(self, matrix: Matrix, drawn: Drawn, chosen: Tensor) -> Tensor:
        """See `Target.flipped`."""
        base, grid = self.base.tensors[matrix.name], GRIDS[self.plain.tensors[matrix.name].ggml_type]
        per_row, made = matrix.columns // grid.block_size, drawn.blocks.clone()
        with open_reader(*(shard.path for shard in self.base.shards)) as reader:
            for piece in row_slices(self.plain.tensors[matrix.name]):
                at = slice(piece.start * per_row, piece.stop * per_row)
                flips = grid.flips(drawn.blocks[at], reader.weights(base, piece))
                made[at], _ = grid.apply(drawn.blocks[at], flips, chosen[piece.start : piece.stop].float())
        return made

    def fingerprint(self) -> str:
        """See `Target.fingerprint`."""
        return sha256_of([self.plain.path])

    def model_key(self) -> str:
        """See `Target.model_key`."""
        return sha256_of([shard.path for shard in self.base.shards])
