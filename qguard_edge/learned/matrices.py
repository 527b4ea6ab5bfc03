"""What learning rounds: the tensors of a GGUF, or the matrices of a folder. The engine needs nothing but this."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.hashes import sha256_of
from qguard_edge.learned.parts import FlipGeometry, Matrix, MatrixParts, make_parts, require_scalar, tensor_geometry


class Target(ABC):
    """Quantized matrices whose rounding can be chosen."""

    @abstractmethod
    def parts(self, parameters: Mapping[str, Tensor], defense: str) -> MatrixParts:
        """Each matrix's rows in a torch model.

        Args:
            parameters: of the torch model, by name, each once.
            defense: for messages.

        Raises:
            UnsupportedError: a matrix whose codes are shared by several weights.
        """

    @abstractmethod
    def geometry(self, matrix: Matrix) -> FlipGeometry:
        """The geometry of one whole matrix, of those that `parts` found in no parameter."""

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

    def parts(self, parameters: Mapping[str, Tensor], defense: str) -> MatrixParts:
        """See `Target.parts`."""
        require_scalar(self.tensors, defense)
        return make_parts(self.base, self.plain, self.tensors, parameters)

    def geometry(self, matrix: Matrix) -> FlipGeometry:
        """See `Target.geometry`."""
        return tensor_geometry(self.base, self.plain, self.plain.tensors[matrix.name])

    def fingerprint(self) -> str:
        """See `Target.fingerprint`."""
        return sha256_of([self.plain.path])

    def model_key(self) -> str:
        """See `Target.model_key`."""
        return sha256_of([shard.path for shard in self.base.shards])
