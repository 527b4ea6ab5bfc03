"""What a conversion is asked for, and what it answers (`qguard_edge.pipeline`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from convert.ftypes import FileType
from convert.quantizer import QuantizeOptions, QuantizeReport
from qguard_edge.calibration import CalibrationOptions
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.learned.settings import LearnReport
from qguard_edge.load_check import LoadCheck
from qguard_edge.rounding import Coverage, TensorRounding
from qguard_edge.verify.results import Outcome


@dataclass(frozen=True)
class ConvertRequest:
    """What the user asked for.

    Attributes:
        model: folder, hub id or .gguf file.
        options: target type and the options that llama-quantize knows too.
        defense: the rounding rule and its options.
        outfile: output file; `{ftype}` and `{FTYPE}` stand for the type's name. None: `NAME-FTYPE.gguf` here.
        revision: of a hub id.
        base_type: precision of the base written from a folder; None keeps the checkpoint's.
        pre: pre-tokenizer name to force.
        converter: llama.cpp's convert_hf_to_gguf.py (or its checkout), for architectures that are not built in; None
            looks at LLAMA_CPP_ROOT.
        device: auto, cpu or cuda.
        seed: of the defense's random numbers; None draws a fresh one.
        keep_reference: also keep llama.cpp's own file, as `NAME.reference.gguf`.
        overwrite: replace an existing output.
        allow_unprotected: accept tensors of types without a grid.
        check_loads: load the result in llama.cpp before it gets its name.
        calibration: the text that learned defenses look at.
        max_memory: bytes that learning may use on its device; None: no limit.
    """

    model: str
    options: QuantizeOptions
    defense: DefenseOptions
    outfile: str | None = None
    revision: str | None = None
    base_type: str | None = None
    pre: str | None = None
    converter: Path | None = None
    device: str = "auto"
    seed: int | None = None
    keep_reference: bool = False
    overwrite: bool = False
    allow_unprotected: bool = False
    check_loads: bool = True
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    max_memory: int | None = None


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
