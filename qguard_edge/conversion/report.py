"""What a conversion answers: one base, and what each output adds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from convert.ftypes import FileType
from convert.quantizer import QuantizeReport
from qguard_edge.conversion.request import ConvertRequest
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.learned.settings import LearnReport
from qguard_edge.rounding.gguf import Coverage, TensorRounding
from qguard_edge.runtimes.load_check import LoadCheck
from qguard_edge.verify.results import Outcome
from qguard_edge.verify.results import Outcome as Verification
from quant_grids import Outcome


@dataclass(frozen=True)
class MovedReport:
    """What was done.

    Attributes:
        outfile: the moved base.
        request: what was asked for.
        seed: that was used.
        tensors: per protected tensor.
        chosen: what the defense chose, before it met the quantizer.
        hashes: SHA-256 of `base` and `output`.
        seconds: wall time of each stage.
        warnings: one sentence each.
        loaded: the load check's answer.
    """

    outfile: Path
    request: ConvertRequest
    seed: int
    tensors: tuple[MovedTensor, ...]
    chosen: tuple[TensorRounding, ...]
    hashes: dict[str, str]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    loaded: LoadCheck | None


@dataclass(frozen=True)
class MatrixRounding:
    """What became of one matrix in one format.

    Attributes:
        name: of the weight.
        kind: nf4, fp4 or int8.
        n_weights: in it.
        outcome: what the chosen codes change.
        given_up: `hf` only: weights that another format had moved out of the cell of their reference code.
        reproduced: `hf` only: codes that the unmodified quantizer gives as planned; None: not checked.
    """

    name: str
    kind: str
    n_weights: int
    outcome: Outcome
    given_up: int = 0
    reproduced: int | None = None


@dataclass(frozen=True)
class FolderReport:
    """What was done.

    Attributes:
        outfile: the finished folder.
        to: nf4, fp4, int8 or hf.
        kinds: formats that the codes were chosen for.
        defense: the rounding rule.
        seed: that was used.
        roundings: per matrix and format.
        kept_tensors: tensors that are not quantized.
        kept_weights: weights in them.
        moved_weights: `hf` only: weights that differ from the original.
        skipped: modules left out, as transformers matches them.
        base_bytes: tensor data read.
        out_bytes: tensor data written.
        hashes: SHA-256 of `base` (all weight files) and of each written weight file, by name.
        seconds: wall time of each stage.
        warnings: one sentence each.
        loaded: the load check's answer.
        learned: what a learned defense reports.
        verification: what `--verify` found; with a failing verdict `outfile` is `NAME.rejected`.
    """

    outfile: Path
    to: str
    kinds: tuple[str, ...]
    defense: DefenseOptions
    seed: int
    roundings: tuple[MatrixRounding, ...]
    kept_tensors: int
    kept_weights: int
    moved_weights: int | None
    skipped: tuple[str, ...]
    base_bytes: int
    out_bytes: int
    hashes: Mapping[str, str]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    loaded: LoadCheck | None = None
    learned: LearnReport | None = None
    verification: Verification | None = None


@dataclass(frozen=True)
class ConvertReport:
    """What was done.

    Attributes:
        outfile: the finished file.
        reference: llama.cpp's own file, if it was kept.
        file_type: the target.
        defense: the rounding rule, None for a base file.
        seed: that was used.
        coverage: which tensors were protected, None for a base file.
        roundings: per protected tensor.
        quantized: what llama.cpp reported.
        base_bytes: size of the base.
        out_bytes: size of the output.
        hashes: SHA-256 of `base`, `reference` and `output`.
        seconds: wall time of each stage.
        warnings: one sentence each.
        loaded: the load check's answer.
        verification: what `--verify` found; with a failing verdict `outfile` is `NAME.rejected.gguf`.
        learned: what a learned defense reports.
    """

    outfile: Path
    reference: Path | None
    file_type: FileType
    defense: DefenseOptions | None
    seed: int | None
    coverage: Coverage | None
    roundings: tuple[TensorRounding, ...]
    quantized: QuantizeReport | None
    base_bytes: int
    out_bytes: int
    hashes: Mapping[str, str]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    loaded: LoadCheck | None = None
    verification: Outcome | None = None
    learned: LearnReport | None = None


@dataclass(frozen=True)
class PlanReport:
    """What was planned: the file, the seed, sums over all tensors, and what learning said."""

    outfile: Path
    seed: int
    tensors: int
    weights: int
    outcome: Outcome
    learned: LearnReport | None
