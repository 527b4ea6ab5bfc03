"""`qguard-edge plan` and `apply`: the two halves of a conversion, for two machines. Nothing here imports llama_cpp.

laptop   qguard-edge convert MODEL --to q4_k --defense none     -> reference GGUF
GPU box  qguard-edge plan MODEL --base ... --reference ...      -> plan (torch and transformers only)
laptop   qguard-edge apply PLAN --reference ...                 -> hardened GGUF, every bit checked
"""

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from convert.atomic import atomic_path, check_writable
from convert.cores import available_cores
from convert.diff import FileDifference, compare_files
from convert.gguf_file import GgufFile
from convert.hashes import sha256_of
from convert.source import open_base, resolve_source
from qguard_edge import __version__
from qguard_edge.conversion.metadata import qguard_entries, total_outcome
from qguard_edge.conversion.plan_file import PlanError, PlanRecorder, apply_plan, read_plan, write_plan
from qguard_edge.defenses.base import make_defense
from qguard_edge.learned.checkpoint import checkpoint_seed
from qguard_edge.learned.matrices import GgufTarget
from qguard_edge.learned.memory import fitted_defense, size_of_gguf
from qguard_edge.learned.settings import LearnTask
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.rounding.gguf import coverage_of, harden, require_coverage
from qguard_edge.runtimes.devices import resolve_device
from quant_grids.errors import UnsupportedError


def make_plan(request: PlanRequest, progress: Progress | None = None) -> PlanReport:
    """Choose the rounding and write it down.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user.
    """
    progress = progress or NoProgress()
    request.defense.check()
    request.calibration.check()
    check_writable(request.outfile)
    source = resolve_source(request.model, request.revision)
    base, reference = open_base(request.base, allow_requantize=False), GgufFile(request.reference)
    warnings: list[str] = []
    request = replace(request, defense=fitted_defense(request, size_of_gguf(base), warnings))
    defense = make_defense(request.defense)
    if defense.requantizes:
        raise UnsupportedError(
            f"--defense {defense.options.name} fits scales anew; that is more than a rounding plan can say"
        )
    coverage = coverage_of(base, reference)
    require_coverage(coverage, request.allow_unprotected)
    checkpoint = request.outfile.with_name(f".{request.outfile.name}.checkpoint")
    seed = request.seed if request.seed is not None else checkpoint_seed(checkpoint)
    seed = secrets.randbits(63) if seed is None else seed
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
                checkpoint=checkpoint,
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
    checkpoint.unlink(missing_ok=True)
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
