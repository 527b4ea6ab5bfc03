"""What calibrated rounding wants to know of a model: for each weight, the mean of `x x^T` over its inputs x.

A source (`GramSource`) runs the full-precision model on texts and leaves a folder; `Grams` reads it. Two sources fill it in:
`activations.LlamaGramSource` (llama.cpp, any GGUF) and `hf_grams.TransformersGramSource` (transformers). Rows of a GGUF's weights
may be permuted against transformers', inputs are not: both give the same matrices under the GGUF's names.

**Experts.** A router sends each row to a few experts, so one that is rarely chosen has seen too little to be trusted with a
matrix of `columns^2` numbers: with n rows, its rank is at most n. Its matrix leans on the pooled one of its layer (the mean over
all rows that any expert saw):

    G = a G_expert + (1 - a) G_pooled,    a = n / (n + columns)

so an expert without a row gets the pooled matrix, and one with many times `columns` rows its own.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from convert.gguf_file import GgufModel
from qguard_edge.progress import Progress
from qguard_edge.runtimes.gram_files import (
    FloatArray,
    GramError,
    GramPiece,
    MeasuredInput,
    WantedWeight,
    load_index,
    read_slices,
)
from qguard_edge.runtimes.kept_rows import KeptRows


class GramSource(Protocol):
    """Something that can run a model and see what its matrix products read."""

    def collect(
        self,
        weights: Sequence[WantedWeight],
        texts: Sequence[Sequence[int]],
        folder: Path,
        *,
        max_memory: int | None = None,
        threads: int = 0,
        progress: Progress | None = None,
    ) -> "Grams":
        """Run the model on texts and add up the inputs of each weight.

        Args:
            weights: whose inputs are wanted, by the names of the GGUF's tensors; see `wanted_weights`.
            texts: token ids, each text a sequence of its own that begins at position 0.
            folder: gets the matrices; made if it is not there. Sums of the same job that an interrupted run left are kept,
                those of another one replaced.
            max_memory: bytes of memory for all of it, mapped pages of the model's file apart; None: no limit.
            threads: 0 for all cores.
            progress: told about tokens.

        Raises:
            GramError: the model cannot be run, or the memory is too small for even one matrix.
        """


@dataclass(frozen=True)
class Diagonal:
    """What an importance matrix is made of.

    Attributes:
        squares: f32 `[slices, columns]`, sums of `x_j^2`.
        counts: f32 `[slices]`, rows that were summed.
    """

    squares: FloatArray
    counts: FloatArray


class Grams:
    """A folder that a source has filled. Reads one matrix at a time.

    Args:
        folder: see `qguard_edge.runtimes.gram_files`.

    Raises:
        GramError: there is nothing in it.
    """

    def __init__(self, folder: Path) -> None:
        index = load_index(folder)
        if index is None:
            raise GramError(f"{folder.name} holds no Gram matrices")
        self.folder, self.index = folder, index
        self._inputs = {name: found for found in index.inputs for name in found.weights if found.measured == found.slices}
        self._pooled = functools.lru_cache(maxsize=1)(self._read_pooled)

    @property
    def names(self) -> tuple[str, ...]:
        """Weights whose inputs were seen."""
        return tuple(self._inputs)

    @property
    def missing(self) -> tuple[str, ...]:
        """Weights that were wanted and of which no input was seen."""
        return (*self.index.missing, *self.skipped)

    @property
    def skipped(self) -> Mapping[str, str]:
        """Of these, the ones whose product cannot be read, with the reason."""
        return self.index.skipped

    @property
    def idle_experts(self) -> Mapping[str, tuple[int, ...]]:
        """Experts that no row was sent to, by weight; weights of which every expert saw something are left out."""
        found = {}
        for name, entry in self._inputs.items():
            if entry.routed and (idle := tuple(i for i in range(entry.slices) if not self.rows(name, i))):
                found[name] = idle
        return found

    def shares(self, tensor: str) -> tuple[str, ...]:
        """All weights that have the same inputs as this one, itself among them: their matrices are equal."""
        return self._input(tensor).weights

    def rows(self, tensor: str, expert: int | None = None) -> int:
        """Rows that a weight (an expert of it) has seen; None: all experts together."""
        counts = [count for piece in self._input(tensor).pieces for count in piece.rows]
        return sum(counts) if expert is None else counts[self._checked(tensor, expert)]

    def of(self, tensor: str, expert: int | None = None) -> Tensor:
        """The mean of `x x^T` over a weight's inputs: f32 `[columns, columns]`, on the CPU, mapped from its file.

        Args:
            tensor: name in the GGUF.
            expert: of a mixture or a stack; None: its pooled matrix. Ordinary weights have 0 and None alike.

        Raises:
            GramError: there is none; see `missing`.
        """
        found = self._input(tensor)
        if not self.index.products:
            raise GramError(f"only sums of squares were measured of {tensor}, no Gram matrix")
        if expert is None:
            return self._pooled(found.weights[0]).clone()
        own = self._own(found, self._checked(tensor, expert))
        if not found.routed:
            return own
        count = self.rows(tensor, expert)
        trust = count / (count + found.columns)
        return own.mul_(trust).add_(self._pooled(found.weights[0]), alpha=1.0 - trust)

    def diagonal(self, tensor: str) -> Diagonal:
        """Sums of squares and counts as they were seen; no expert leans on another here."""
        found = self._input(tensor)
        squares = [self._read(found, i, "squares", (found.columns,)) for i in range(found.slices)]
        counts = np.array([self.rows(tensor, i) for i in range(found.slices)], np.float32)
        return Diagonal(np.stack(squares), counts)

    def mean_squares(self, tensor: str) -> FloatArray:
        """The diagonals of what `of` returns, without reading whole matrices: f32 `[slices, columns]`."""
        found, seen = self._input(tensor), self.diagonal(tensor)
        counts = seen.counts[:, None]
        own: FloatArray = (seen.squares / np.maximum(counts, 1.0)).astype(np.float32)
        if not found.routed:
            return own
        pooled = seen.squares.sum(0) / max(1.0, float(counts.sum()))
        trust = counts / (counts + found.columns)
        mixed: FloatArray = (trust * own + (1.0 - trust) * pooled).astype(np.float32)
        return mixed

    def _input(self, tensor: str) -> MeasuredInput:
        if tensor not in self._inputs:
            reason = self.skipped.get(tensor, "no product of the model reads it")
            raise GramError(f"there is no Gram matrix of {tensor}: {reason}")
        return self._inputs[tensor]

    def _checked(self, tensor: str, expert: int) -> int:
        slices = self._input(tensor).slices
        if not 0 <= expert < slices:
            raise GramError(f"{tensor} has {slices} experts, there is no number {expert}")
        return expert

    def _read(self, found: MeasuredInput, index: int, kind: str, shape: tuple[int, ...]) -> FloatArray:
        piece = _piece_of(found, index)
        return read_slices(self.folder / f"{piece.stem}.{kind}", shape, index - piece.first, 1).reshape(shape)

    def _own(self, found: MeasuredInput, index: int) -> Tensor:
        """What a slice itself saw, f32 `[columns, columns]`."""
        if found.kept_rows:
            return self._kept(found).gram(index)
        return torch.from_numpy(self._read(found, index, "gram", (found.columns, found.columns)))

    def _kept(self, found: MeasuredInput) -> KeptRows:
        (piece,) = found.pieces
        return KeptRows(self.folder / piece.stem, found.columns, piece.rows)

    def _read_pooled(self, owner: str) -> Tensor:
        found = self._inputs[owner]
        if found.kept_rows:
            return self._kept(found).pooled()
        total = torch.zeros(found.columns, found.columns)
        for index in range(found.slices):
            own = self._own(found, index)
            total.add_(own, alpha=float(self.rows(owner, index)))
        return total.div_(max(1, self.rows(owner)))


def _piece_of(found: MeasuredInput, index: int) -> GramPiece:
    """The piece that holds a slice."""
    return next(piece for piece in found.pieces if piece.first <= index < piece.first + len(piece.rows))


def wanted_weights(base: GgufModel, names: Sequence[str] | None = None) -> tuple[WantedWeight, ...]:
    """The matrices of a base as `GramSource.collect` takes them.

    Args:
        base: full precision.
        names: of tensors; None: every tensor of two dimensions or more. Those that are no matrix of a product (an embedding
            that is not the output matrix too, a convolution) come back as missing.
    """
    chosen = [base.tensors[name] for name in names] if names is not None else list(base.tensors.values())
    matrices = [tensor for tensor in chosen if len(tensor.shape) >= 2 and tensor.rows > 1]
    return tuple(
        WantedWeight(tensor.name, tensor.columns, tensor.n_weights // (tensor.shape[0] * tensor.shape[1]))
        for tensor in matrices
    )
