"""What a conversion answers: one base class, and what each kind of output adds."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from convert.ftypes import FileType
from convert.quantizer import QuantizeReport
from qguard_edge.conversion.activations import ActivationReport
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.learned.settings import LearnReport
from qguard_edge.rounding.gguf import Coverage, TensorRounding
from qguard_edge.rounding.gguf_moved import MovedTensor
from qguard_edge.runtimes.fidelity import BesidePlain
from qguard_edge.runtimes.load_check import LoadCheck
from qguard_edge.verify.results import Verification
from quant_grids import Outcome

Report = TypeVar("Report", bound="ConversionReport")


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What every conversion answers.

    Attributes:
        outfile: the finished output; after a failing verdict `NAME.rejected.gguf` or `NAME.rejected`.
        defense: the rounding rule as it ran; None where nothing was rounded.
        seed: that was used; None where nothing was rounded.
        base_bytes: size of the base's tensors.
        out_bytes: size of the output.
        hashes: SHA-256 of the files, by role (`base`, `plain`, `output`) or by file name.
        seconds: wall time of each stage.
        warnings: one sentence each.
        loaded: the load check's answer.
        verification: what `--verify` found.
        learned: what a learned defense reports.
        activations: what was seen of the inputs of matrices, for a defense that wants it.
        entropy_bits: of the random choices, over all matrices, where the rule measures it: what cannot be known of the codes
            without the seed.
    """

    outfile: Path
    defense: DefenseOptions | None
    seed: int | None
    base_bytes: int
    out_bytes: int
    hashes: Mapping[str, str]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    loaded: LoadCheck | None = None
    verification: Verification | None = None
    learned: LearnReport | None = None
    activations: ActivationReport | None = None
    entropy_bits: float = 0.0

    def extended(self, kind: type[Report], **more: Any) -> Report:
        """The same facts as a report of another kind, with what it adds; a field that is given replaces the old one."""
        common = {item.name: getattr(self, item.name) for item in fields(ConversionReport)}
        return kind(**(common | more))


@dataclass(frozen=True, kw_only=True)
class GgufReport(ConversionReport):
    """Of a GGUF.

    Attributes:
        file_type: the target.
        plain: llama.cpp's own file, if it was kept.
        coverage: which tensors were protected; None for a full-precision file.
        roundings: per protected tensor.
        quantized: what llama.cpp reported; None where it had nothing to do.
        beside_plain: how near the file is to full precision, and plain rounding; None: not measured.
        bits_per_weight: of all tensors of the file.
        mmproj: the vision or audio half, if it was written.
    """

    file_type: FileType
    plain: Path | None = None
    coverage: Coverage | None = None
    roundings: tuple[TensorRounding, ...] = ()
    quantized: QuantizeReport | None = None
    beside_plain: BesidePlain | None = None
    bits_per_weight: float | None = None
    mmproj: Path | None = None


@dataclass(frozen=True, kw_only=True)
class MovedGgufReport(ConversionReport):
    """Of a full-precision GGUF whose quantization is hardened.

    Attributes:
        file_type: the type it is made for.
        tensors: per protected tensor, what llama.cpp makes of it.
        chosen: what the defense chose, before it met the quantizer.
    """

    file_type: FileType
    tensors: tuple[MovedTensor, ...]
    chosen: tuple[TensorRounding, ...]


@dataclass(frozen=True)
class MatrixRounding:
    """What became of one matrix of a folder in one format.

    Attributes:
        name: of the weight.
        kind: nf4, fp4 or int8.
        n_weights: in it.
        outcome: what the chosen codes change.
        given_up: `hf` only: weights that another format had moved out of the cell of their plain code.
        reproduced: `hf` only: codes that the unmodified quantizer gives as planned; None: not checked.
        bits: entropy of the random choices, where the rule measures it.
    """

    name: str
    kind: str
    n_weights: int
    outcome: Outcome
    given_up: int = 0
    reproduced: int | None = None
    bits: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FolderReport(ConversionReport):
    """Of a folder for bitsandbytes.

    Attributes:
        to: nf4, fp4, int8 or hf.
        kinds: formats that the codes were chosen for.
        roundings: per matrix and format.
        kept_tensors: tensors that are not quantized.
        kept_weights: weights in them.
        moved_weights: `hf` only: weights that differ from the original.
        skipped: modules left out, as transformers matches them.
    """

    to: str
    kinds: tuple[str, ...]
    roundings: tuple[MatrixRounding, ...]
    kept_tensors: int
    kept_weights: int
    moved_weights: int | None
    skipped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PlanReport(ConversionReport):
    """Of a rounding plan: how many tensors and weights it speaks of, and what it changes, summed over all of them."""

    tensors: int
    weights: int
    outcome: Outcome
