"""`qguard-edge plan` and `apply`: the two halves of a conversion, for two machines. Nothing here imports llama_cpp.

laptop   qguard-edge convert MODEL --to q4_k --defense none     -> reference GGUF
GPU box  qguard-edge plan MODEL --base ... --reference ...      -> plan (torch and transformers only)
laptop   qguard-edge apply PLAN --reference ...                 -> hardened GGUF, every bit checked
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.atomic import atomic_path, check_writable
from convert.compare import FileDifference, compare_files
from convert.cores import available_cores
from convert.gguf_file import GgufFile
from convert.patch import sha256_of
from qguard_edge import __version__
from qguard_edge.calibration import CalibrationOptions
from qguard_edge.defenses.base import make_defense
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.guard import Guard
from qguard_edge.learned.checkpoint import begin_attempt
from qguard_edge.learned.memory import fitted_defense, size_of_gguf
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.learned.targets import GgufTarget
from qguard_edge.metadata import qguard_entries, total_outcome
from qguard_edge.plan_file import PlanError, PlanRecorder, apply_plan, read_plan, write_plan
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.rounding import coverage_of, harden, require_coverage, resolve_device
from qguard_edge.source import open_base, resolve_source
from quant_grids import Outcome
from quant_grids.errors import UnsupportedError


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


@dataclass(frozen=True)
class PlanReport:
    """What was planned: the file, the seed, sums over all tensors, and what learning said."""

    outfile: Path
    seed: int
    tensors: int
    weights: int
    outcome: Outcome
    learned: LearnReport | None


def make_plan(request: PlanRequest, progress: Progress | None = None, guard: Guard | None = None) -> PlanReport:
    """Choose the rounding and write it down.

    Args:
        request: what the user asked for.
        progress: told about each stage.
        guard: asked about base and reference first.

    Raises:
        UnsupportedError: the guard wants tensors in full precision, and the reference is there already.
        QGuardError: one of its kinds, with a sentence for the user.
    """
    progress = progress or NoProgress()
    request.defense.check()
    request.calibration.check()
    check_writable(request.outfile)
    source = resolve_source(request.model, request.revision)
    base, reference = open_base(request.base, allow_requantize=False), GgufFile(request.reference)
    if guard and guard.after(base, reference):
        raise UnsupportedError(
            "flagged tensors cannot be kept in full precision here, for the reference is there already; make it anew with "
            "--tensor-type NAME=f16 for each of them"
        )
    warnings: list[str] = []
    request = replace(request, defense=fitted_defense(request, size_of_gguf(base), warnings))
    defense = make_defense(request.defense)
    if defense.requantizes:
        raise UnsupportedError(
            f"--defense {defense.options.name} fits scales anew; that is more than a rounding plan can say"
        )
    coverage = coverage_of(base, reference)
    require_coverage(coverage, request.allow_unprotected)
    attempt = begin_attempt(request.outfile, request.defense, request.seed)
    seed = attempt.seed
    device = resolve_device(request.device)
    learned = None
    if defense.learns:
        learned = defense.prepare(
            LearnTask(
                model=source.path,
                target=GgufTarget(base, reference, coverage.protected),
                seed=seed,
                device=device,
                calibration=request.calibration,
                checkpoint=attempt.checkpoint,
                threads=request.threads,
                progress=progress,
            )
        )
        learned = replace(learned, warnings=(*warnings, *learned.warnings))
    recorder = PlanRecorder(reference)
    try:
        weights = sum(tensor.n_weights for tensor in coverage.protected)
        progress.stage(f"Choosing the rounding ({defense.options.name})", weights, "weights")
        roundings = harden(
            base,
            reference,
            coverage.protected,
            defense,
            seed=seed,
            sink=recorder,
            threads=request.threads,
            device=device,
            progress=progress,
        )
    finally:
        recorder.close()
    hashes = {"base": sha256_of([shard.path for shard in base.shards]), "reference": sha256_of([reference.path])}
    header = {
        "reference_sha256": hashes["reference"],
        "options": asdict(request.defense),
        "metadata": qguard_entries(__version__, request.defense, seed, hashes, roundings, learned),
    }
    write_plan(request.outfile, recorder.tensors(), header)
    attempt.finish()
    return PlanReport(request.outfile, seed, len(roundings), weights, total_outcome(roundings), learned)


@dataclass(frozen=True)
class ApplyReport:
    """What was written: the file, codes changed per tensor, the comparison with the reference, and the plan's header."""

    outfile: Path
    changed: Mapping[str, int]
    difference: FileDifference
    header: Mapping[str, Any]


def apply_to(plan_path: Path, reference_path: Path, outfile: Path, *, overwrite: bool, progress: Progress) -> ApplyReport:
    """Write the hardened file of a plan and hold every bit of it against the reference.

    Raises:
        PlanError: the plan does not belong to the reference, or the file is not what the plan says.
        OutputError: the output exists or cannot be written.
    """
    check_writable(outfile)
    if outfile.exists() and (not overwrite or outfile.samefile(reference_path)):
        raise PlanError(f"{outfile.name} exists; pass --overwrite to replace it (the reference itself is never replaced)")
    plan, reference = read_plan(plan_path), GgufFile(reference_path)
    with atomic_path(outfile) as temporary:
        changed = apply_plan(plan, reference, temporary, progress)
        difference = compare_files(reference_path, temporary, threads=available_cores())
        for tensor in difference.tensors:
            if tensor.foreign_bytes or tensor.codes_changed != changed.get(tensor.name, 0):
                raise PlanError(f"{tensor.name!r} was not written as planned; please report this")
        if difference.metadata:
            raise PlanError(f"the metadata key {difference.metadata[0]!r} changed; please report this")
    return ApplyReport(outfile, changed, difference, plan.header)
