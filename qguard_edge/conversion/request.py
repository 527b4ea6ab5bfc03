"""What a conversion is asked for, and what it answers (`qguard_edge.conversion.outputs.gguf`)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from convert.folder_targets import kinds_of
from convert.hf_folder import SHARD_BYTES
from convert.quantizer import QuantizeOptions
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.learned.calibration import CalibrationOptions
from quant_grids.errors import UnsupportedError


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


DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FolderRequest:
    """What the user asked for.

    Attributes:
        model: folder or hub id.
        to: nf4, fp4, int8 or hf.
        defense: the rounding rule and its options.
        target: for `hf`: nf4, fp4, int8 or all; None means all.
        outfile: output folder; `{ftype}` and `{FTYPE}` are replaced. None: `NAME-FTYPE` here.
        revision: of a hub id.
        base_type: precision of what is not quantized: f32, f16 or bf16; None keeps the checkpoint's.
        device: auto, cpu or cuda.
        seed: of the defense's random numbers; None draws a fresh one.
        threads: 0 for all cores.
        skip: more modules to leave alone.
        double_quant: compress the scales of NF4 and FP4.
        overwrite: replace an existing model folder.
        check_loads: load the result in transformers, and for `hf` really quantize it.
        shard_bytes: largest shard.
        calibration: the text that learned defenses look at.
        max_memory: bytes that learning may use on its device; None: no limit.
    """

    model: str
    to: str
    defense: DefenseOptions
    target: str | None = None
    outfile: str | None = None
    revision: str | None = None
    base_type: str | None = None
    device: str = "auto"
    seed: int | None = None
    threads: int = 0
    skip: tuple[str, ...] = ()
    double_quant: bool = False
    overwrite: bool = False
    check_loads: bool = True
    shard_bytes: int = SHARD_BYTES
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    max_memory: int | None = None

    def check(self) -> tuple[str, ...]:
        """Hold the options against each other; the formats that are asked for.

        Raises:
            UnsupportedError: they contradict each other.
        """
        kinds = kinds_of(self.to, self.target)
        self.defense.check()
        if self.defense.calibrated and self.to == "hf":
            raise UnsupportedError(
                f"--defense {self.defense.name} learns the codes of one format; choose --to nf4, fp4 or int8, or a data-free "
                "defense"
            )
        self.calibration.check()
        if self.double_quant and self.to not in ("nf4", "fp4"):
            raise UnsupportedError(
                f"--bnb-double-quant compresses the scales of nf4 and fp4; --to {self.to} stores none of these"
            )
        if self.base_type is not None and self.base_type not in DTYPES:
            raise UnsupportedError(f"--base-type {self.base_type!r}: choose one of {', '.join(DTYPES)}")
        return kinds


@dataclass(frozen=True)
class PlanRequest:
    """What to plan.

    Attributes:
        model: folder, hub id or .gguf that transformers can run; only learned defenses look at it.
        base: full-precision GGUF.
        reference: llama.cpp's own quantization of it.
        outfile: the plan.
        defense: the rounding rule and its options.
        revision: of a hub id.
        device: auto, cpu or cuda.
        seed: None draws a fresh one.
        threads: 0 for all cores.
        allow_unprotected: accept tensors of types without a grid.
        calibration: text for learned defenses.
        max_memory: bytes that learning may use on its device; None: no limit.
    """

    model: str
    base: Path
    reference: Path
    outfile: Path
    defense: DefenseOptions
    revision: str | None = None
    device: str = "auto"
    seed: int | None = None
    threads: int = 0
    allow_unprotected: bool = False
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    max_memory: int | None = None
