"""What a conversion is asked for: one base class, and what each kind of output adds."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch

from convert.folder_targets import kinds_of
from convert.hf.external import MMPROJ_TYPES
from convert.hf_folder import SHARD_BYTES
from convert.quantizer import QuantizeOptions
from convert.split import SplitRule
from qguard_edge.defenses.options import DefenseOptions, NoiseOptions, QVecOptions
from qguard_edge.learned.calibration import CalibrationOptions
from quant_grids.errors import UnsupportedError

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ConversionRequest(ABC):
    """What every conversion is asked for.

    Attributes:
        model: folder, hub id or .gguf file.
        defense: the rounding rule and its options.
        outfile: output; `{ftype}` and `{FTYPE}` stand for the type's name. None: a name made from the model's, here.
        revision: of a hub id.
        base_type: precision of the base written from a folder, or of what a folder leaves unquantized: f32, f16 or bf16;
            None keeps the checkpoint's.
        device: auto, cpu or cuda.
        seed: of the defense's random numbers; None draws a fresh one.
        overwrite: replace an existing output.
        check_loads: load the result before it gets its name.
        calibration: the text that learned defenses are fitted to.
        max_memory: bytes that learning may use on its device; None: no limit.
    """

    model: str
    defense: DefenseOptions
    outfile: str | Path | None = None
    revision: str | None = None
    base_type: str | None = None
    device: str = "auto"
    seed: int | None = None
    overwrite: bool = False
    check_loads: bool = True
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    max_memory: int | None = None

    @property
    @abstractmethod
    def threads(self) -> int:
        """Processor threads; 0 for all cores."""

    @property
    def trusts_in_transformers(self) -> bool:
        """Whether transformers may run Python code that the folder brings, in this process, without a limit: for a plan alone."""
        return False

    def check(self) -> None:
        """Hold the options against their limits and against each other.

        Raises:
            UnsupportedError: naming the option, the value and the limit.
        """
        self.defense.check()
        self.calibration.check()


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(ConversionRequest, ABC):
    """What every output that llama.cpp quantizes is asked for.

    Attributes:
        options: target type and the options that llama-quantize has too.
        pre: pre-tokenizer name to force.
        converter: llama.cpp's convert_hf_to_gguf.py (or its checkout), for architectures that are not built in; None
            looks at LLAMA_CPP_ROOT, then at what `qguard-edge converter install` fetched.
        trust_remote_code: let that converter read a folder that brings Python code.
        allow_unprotected: accept tensors of types without a grid.
        no_fallback: refuse a model that llama.cpp would store in part as another type than the one asked for.
        split: cut the output, and a plain file that is kept, into shards.
        mmproj: precision of the vision or audio half of a folder, written beside the output: f32, f16, bf16 or q8_0; None leaves
            it out.
    """

    options: QuantizeOptions
    pre: str | None = None
    converter: Path | None = None
    trust_remote_code: bool = False
    allow_unprotected: bool = False
    no_fallback: bool = False
    split: SplitRule | None = None
    mmproj: str | None = None

    @property
    def threads(self) -> int:
        """See `ConversionRequest.threads`."""
        return self.options.threads

    def check(self) -> None:
        """See `ConversionRequest.check`."""
        self.options.check()
        if self.split is not None:
            self.split.check()
        if self.mmproj is not None and self.mmproj not in MMPROJ_TYPES:
            raise UnsupportedError(f"--mmproj {self.mmproj!r:.40}: choose one of {', '.join(MMPROJ_TYPES)}")
        super().check()

    def with_types(self, types: tuple[tuple[str, str], ...]) -> Self:
        """The request with types of certain tensors put before the user's own."""
        options = self.options
        return replace(self, options=replace(options, tensor_types=(*types, *options.tensor_types))) if types else self


@dataclass(frozen=True, kw_only=True)
class GgufRequest(QuantizeRequest):
    """A hardened GGUF, or a full-precision one with `--to f32|f16|bf16`.

    Attributes:
        keep_plain: also keep llama.cpp's own file, as `NAME.plain.gguf`.
        fidelity: measure how far the file and plain rounding are from full precision, in llama.cpp on a short built-in text,
            where that costs little beside the conversion; not without the load check.
    """

    keep_plain: bool = False
    fidelity: bool = False


@dataclass(frozen=True, kw_only=True)
class MovedGgufRequest(QuantizeRequest):
    """A full-precision GGUF that llama-quantize rounds to the chosen codes; `options.file_type` is the type it is made for."""

    def check(self) -> None:
        """See `ConversionRequest.check`."""
        super().check()
        if self.options.file_type.base:
            raise UnsupportedError(
                f"--target {self.options.file_type.name}: nothing is rounded there; choose a quantized type such as q4_0"
            )

    @property
    def on_fixed_grid(self) -> "MovedGgufRequest":
        """The request with a defense that keeps the scales: the codes are to be reached on the base's own grid."""
        defense = self.defense
        if isinstance(defense, NoiseOptions | QVecOptions) and defense.mode == "requantize":
            return replace(self, defense=replace(defense, mode="fixed-grid"))
        return self


@dataclass(frozen=True, kw_only=True)
class FolderRequest(ConversionRequest):
    """A hardened folder for bitsandbytes.

    Attributes:
        to: nf4, fp4, int8 or hf.
        target: for `hf`: nf4, fp4, int8 or all; None means all.
        threads: 0 for all cores.
        skip: more modules to leave alone.
        double_quant: compress the scales of NF4 and FP4.
        shard_bytes: largest shard.
    """

    to: str
    target: str | None = None
    threads: int = 0
    skip: tuple[str, ...] = ()
    double_quant: bool = False
    shard_bytes: int = SHARD_BYTES

    @property
    def kinds(self) -> tuple[str, ...]:
        """Formats that codes are chosen for.

        Raises:
            UnsupportedError: `to` and `target` contradict each other.
        """
        return kinds_of(self.to, self.target)

    def check(self) -> None:
        """See `ConversionRequest.check`."""
        assert self.kinds
        super().check()
        if self.defense.calibrated and self.to == "hf":
            raise UnsupportedError(
                f"--defense {self.defense.name} fits the codes of one format to text; choose --to nf4, fp4 or int8, or a "
                "data-free defense such as --defense ortho"
            )
        if self.double_quant and self.to not in ("nf4", "fp4"):
            raise UnsupportedError(
                f"--bnb-double-quant compresses the scales of nf4 and fp4; --to {self.to} stores none of these"
            )
        if self.base_type is not None and self.base_type not in DTYPES:
            raise UnsupportedError(f"--base-type {self.base_type!r}: choose one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class PlanRequest(ConversionRequest):
    """A rounding plan, for a base and its plain quantization that are there already.

    Attributes:
        base: full-precision GGUF.
        plain: llama.cpp's own quantization of it.
        outfile: the plan.
        threads: 0 for all cores.
        allow_unprotected: accept tensors of types without a grid.
        trust_remote_code: let transformers run Python code that the folder brings.
    """

    base: Path
    plain: Path
    outfile: str | Path
    threads: int = 0
    allow_unprotected: bool = False
    trust_remote_code: bool = False

    @property
    def trusts_in_transformers(self) -> bool:
        """See `ConversionRequest.trusts_in_transformers`."""
        return self.trust_remote_code

    def check(self) -> None:
        """See `ConversionRequest.check`."""
        super().check()
        if isinstance(self.defense, NoiseOptions | QVecOptions) and self.defense.mode == "requantize":
            raise UnsupportedError(
                f"--defense {self.defense.name} fits scales anew; that is more than a rounding plan can say"
            )
