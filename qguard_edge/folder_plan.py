"""From "convert this to a folder" to a checked plan: what is read, what is quantized, where it goes. Writes nothing.

Which modules bitsandbytes quantizes is asked of transformers (every Linear but the output head and tied weights), so a
folder made here has exactly the modules that `load_in_4bit` would have made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convert.atomic import OutputError, check_folder_writable
from convert.bnb_layout import stored_bytes
from convert.folder_targets import kinds_of
from convert.hf.checkpoint import PLAIN_DTYPES, Checkpoint, SourceTensor
from convert.hf.jsonfile import Section, read_json
from convert.hf.quantized import open_weights
from convert.hf_folder import CONFIG_NAME, SHARD_BYTES
from qguard_edge.calibration import CalibrationOptions
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.hf_runtime import LinearModules, linear_modules
from qguard_edge.learned.memory import LearningCost, ModelSize, dry_cost, size_of
from qguard_edge.source import Source, resolve_source
from quant_grids.errors import UnsupportedError

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


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
class FolderPlan:
    """A folder that was opened and understood; nothing is written yet.

    Attributes:
        source: the model.
        outfile: the final name.
        kinds: formats.
        config: config.json.
        checkpoint: the weights.
        modules: what gets quantized.
        warnings: one sentence each.
    """

    source: Source
    outfile: Path
    kinds: tuple[str, ...]
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    modules: LinearModules
    warnings: tuple[str, ...]

    def size(self) -> ModelSize:
        """Of the model, for the estimates of learning."""
        return size_of((tensor.name, tensor.shape) for tensor in self.checkpoint.tensors.values())

    def module_of(self, tensor: SourceTensor) -> str | None:
        """Name of the module whose weight this is, if it is to be quantized."""
        name = tensor.name.removesuffix(".weight")
        return name if name != tensor.name and name in self.modules.transposed else None


def plan_folder(request: FolderRequest) -> FolderPlan:
    """Open a model and rule out every way to fail, short of a disk error, without writing anything.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user.
    """
    kinds = request.check()
    source = resolve_source(request.model, request.revision)
    if source.is_gguf:
        raise UnsupportedError(
            f"--to {request.to} writes a Hugging Face folder and needs one as input, not {source.path.name}"
        )
    template = request.outfile or f"{source.name}-{{FTYPE}}"
    outfile = Path(template.replace("{ftype}", request.to).replace("{FTYPE}", request.to.upper())).expanduser()
    if outfile.resolve().is_relative_to(source.path.resolve()) or source.path.resolve().is_relative_to(outfile.resolve()):
        raise OutputError(f"the output {outfile.name} and the input lie in one another; choose another name with --outfile")
    check_folder_writable(outfile, overwrite=request.overwrite, marker=CONFIG_NAME)
    config = read_json(source.path / CONFIG_NAME)
    checkpoint, warnings = open_weights(source.path, Section(config, CONFIG_NAME))
    modules = linear_modules(source.path, request.skip)
    _check_weights(checkpoint, modules)
    return FolderPlan(source, outfile, kinds, config, checkpoint, modules, warnings)


def _check_weights(checkpoint: Checkpoint, modules: LinearModules) -> None:
    if not modules.transposed:
        raise UnsupportedError(
            "this model has no linear module that bitsandbytes would quantize; convert it to a GGUF instead"
        )
    for name in modules.transposed:
        tensor = checkpoint.tensors.get(f"{name}.weight")
        if tensor is None:
            raise UnsupportedError(
                f"the checkpoint has no tensor {name}.weight, which bitsandbytes would quantize; leave the module out with "
                f"--bnb-skip {name}, or save the model anew with a current transformers"
            )
        if tensor.dtype not in PLAIN_DTYPES or len(tensor.shape) != 2 or tensor.elements == 0:
            raise UnsupportedError(
                f"tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}; only matrices of F32, F16 or BF16 can be quantized"
            )


def source_bytes(tensor: SourceTensor) -> int:
    """Size of a tensor's data as it is read."""
    return tensor.elements * _SIZES.get(tensor.dtype, 1)


@dataclass(frozen=True)
class DryFolderTensor:
    """One tensor's fate, for `--dry-run`.

    Attributes:
        name: in the checkpoint.
        shape: outermost dimension first.
        source_type: type in the checkpoint.
        target_type: type in the output.
        n_bytes: in the output.
        protection: "scalar", or "float" where nothing is rounded.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    target_type: str
    n_bytes: int
    protection: str


@dataclass(frozen=True)
class DryFolder:
    """What a conversion would do.

    Attributes:
        outfile: the name that the folder would get.
        tensors: one entry each.
        base_bytes: tensor data read.
        out_bytes: tensor data written.
        warnings: one sentence each.
        learning: what a learned defense will cost.
    """

    outfile: Path
    tensors: tuple[DryFolderTensor, ...]
    base_bytes: int
    out_bytes: int
    warnings: tuple[str, ...]
    learning: LearningCost | None = None


def dry_folder(request: FolderRequest) -> DryFolder:
    """Plan a conversion without writing anything.

    Raises:
        QGuardError: what the conversion would meet before it reads a weight.
    """
    plan = plan_folder(request)
    tensors = []
    for tensor in plan.checkpoint.tensors.values():
        rounded = plan.module_of(tensor) is not None
        floating = tensor.dtype in PLAIN_DTYPES
        kept = request.base_type.upper() if request.base_type and floating else tensor.dtype
        size = tensor.elements * _SIZES.get(kept, 1)
        target = kept
        if rounded and request.to != "hf":
            target = request.to.upper()
            size = stored_bytes(request.to, (tensor.shape[0], tensor.shape[1]), request.double_quant)
        protection = "scalar" if rounded else "float"
        tensors.append(DryFolderTensor(tensor.name, tensor.shape, tensor.dtype, target, size, protection))
    base = sum(source_bytes(tensor) for tensor in plan.checkpoint.tensors.values())
    warnings = list(plan.warnings)
    learning = dry_cost(request, plan.size(), warnings)
    out = sum(tensor.n_bytes for tensor in tensors)
    return DryFolder(plan.outfile, tuple(tensors), base, out, tuple(warnings), learning)
