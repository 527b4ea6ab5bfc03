"""The main job, written once for every output.

    open -> base -> scan -> memory -> activations -> plain -> learn and choose -> check -> load -> verify -> name

An *output* (`qguard_edge.conversion.outputs`) fills in what differs: a hardened GGUF, a full-precision one, one whose weights
are moved, a folder for bitsandbytes, a rounding plan. Everything before the last step happens in a hidden work folder beside
the output, which goes away however the conversion ends. The library returns a report; printing is the command line's job.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

from convert.atomic import work_folder
from convert.hashes import sha256_of
from convert.outputs import reserve
from convert.pinned import Pinned
from qguard_edge.conversion.activations import forget_activations
from qguard_edge.conversion.learning import Learning, require_transformers
from qguard_edge.conversion.naming import rejected_path
from qguard_edge.conversion.outputs.base import Gate, Guard, Job, Output
from qguard_edge.conversion.outputs.float_gguf import FloatGgufOutput
from qguard_edge.conversion.outputs.folder import FolderOutput
from qguard_edge.conversion.outputs.gguf import GgufOutput
from qguard_edge.conversion.outputs.moved_folder import MovedFolderOutput
from qguard_edge.conversion.outputs.moved_gguf import MovedGgufOutput
from qguard_edge.conversion.outputs.plan import PlanOutput
from qguard_edge.conversion.report import (
    ConversionReport,
    FolderReport,
    GgufReport,
    MovedGgufReport,
    PlanReport,
    Report,
)
from qguard_edge.conversion.request import (
    ConversionRequest,
    FolderRequest,
    GgufRequest,
    MovedGgufRequest,
    PlanRequest,
)
from qguard_edge.defenses.base import make_defense
from qguard_edge.learned.defense import LearnedDefense
from qguard_edge.learned.memory import fitted_defense
from qguard_edge.progress import Clock, NoProgress, Progress
from qguard_edge.runtimes.devices import resolve_device
from qguard_edge.verify.results import Verdict
from quant_grids.errors import UnsupportedError


@overload
def convert_model(
    request: MovedGgufRequest, progress: Progress | None = None, gate: Gate | None = None, guard: Guard | None = None
) -> MovedGgufReport: ...
@overload
def convert_model(
    request: GgufRequest, progress: Progress | None = None, gate: Gate | None = None, guard: Guard | None = None
) -> GgufReport: ...
@overload
def convert_model(
    request: FolderRequest, progress: Progress | None = None, gate: Gate | None = None, guard: Guard | None = None
) -> FolderReport: ...
@overload
def convert_model(
    request: PlanRequest, progress: Progress | None = None, gate: Gate | None = None, guard: Guard | None = None
) -> PlanReport: ...
def convert_model(
    request: ConversionRequest, progress: Progress | None = None, gate: Gate | None = None, guard: Guard | None = None
) -> ConversionReport:
    """Convert a model; on any error nothing is left under the final name.

    Args:
        request: what the user asked for; its class decides what is written.
        progress: of the stages.
        gate: verifies the finished output before it gets its name; with a failing verdict it is named `NAME.rejected`.
        guard: scans the model before it is rounded, and may refuse (`qguard_edge.scan.guard`); None: no scan.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user.
    """
    request.check()
    output: Output[Any, ConversionReport] = output_for(request)
    return run(output, progress or NoProgress(), gate, guard)


def output_for(request: ConversionRequest) -> Output[Any, Any]:
    """The kind of output that a request is for."""
    match request:
        case MovedGgufRequest():
            return MovedGgufOutput(request)
        case GgufRequest():
            return FloatGgufOutput(request) if request.options.file_type.base else GgufOutput(request)
        case FolderRequest():
            return MovedFolderOutput(request) if request.to == "hf" else FolderOutput(request)
        case PlanRequest():
            return PlanOutput(request)
    raise UnsupportedError(f"{type(request).__name__} is no request that a conversion knows")


def run(output: Output[Any, Report], progress: Progress, gate: Gate | None, guard: Guard | None) -> Report:
    """All stages of one conversion; arguments and errors as for `convert_model`."""
    output.open()
    pinned = Pinned(output.inputs())
    with _names_held(output, gate):
        return _finished(output, pinned, progress, gate, guard)


@contextmanager
def _names_held(output: Output[Any, Any], gate: Gate | None) -> Iterator[None]:
    """Hold everything that the conversion may write, under its final name, for the run."""
    outfile = output.outfile
    rejected = (rejected_path(outfile),) if gate and output.rounds else ()
    with reserve([outfile, *output.files_beside(outfile), *rejected]):
        for name in (outfile, *rejected):
            output.check_names(name)
        yield


def _finished(
    output: Output[Any, Report], pinned: Pinned, progress: Progress, gate: Gate | None, guard: Guard | None
) -> Report:
    try:
        return _stages(output, pinned, progress, gate, guard)
    except Exception:
        # Only a conversion that is stopped from outside goes on where it was: one that fails leaves nothing.
        forget_activations(output.outfile)
        raise


def _stages(
    output: Output[Any, Report], pinned: Pinned, progress: Progress, gate: Gate | None, guard: Guard | None
) -> Report:
    clock, warnings = Clock(), list(output.warnings)
    with work_folder(output.outfile) as work, ThreadPoolExecutor(1) as pool:
        with clock.stage("base"):
            warnings += output.make_base(work, progress)
        # Hashing the base costs a quarter second per gigabyte: it runs beside the stages that follow.
        base_hash = pool.submit(sha256_of, output.base_files())
        if output.rounds and guard:
            with clock.stage("scan"):
                output.scan(guard)
        if output.rounds:
            output.request = replace(output.request, defense=fitted_defense(output.request, output.size(), warnings))
        request = output.request
        learning = Learning.begin(request, output.outfile)
        job = Job(
            work, progress, clock, learning.seed, make_defense(request.defense), resolve_device(request.device), base_hash
        )
        if output.rounds and isinstance(job.defense, LearnedDefense) and job.defense.runs_transformers:
            require_transformers(request.defense, output.model_path(), trust_remote_code=request.trusts_in_transformers)
        # What the scan refuses in the light of the plain file is refused before the minutes that activations take.
        first = not output.plain_wants_inputs()
        if first:
            output.make_plain(job, guard)
        if output.rounds and job.defense.wants_inputs:
            with clock.stage("activations"):
                job.activations = output.see_activations(job)
        if not first:
            output.make_plain(job, guard)
        if output.rounds and isinstance(job.defense, LearnedDefense) and (target := output.target()):
            with clock.stage("learn"):
                job.learned = learning.learn(
                    request, job.defense, output.model_path(), target, job.device, progress, job.activations
                )
        made = output.write(job)
        if request.check_loads and output.loads:
            progress.stage(f"Loading the {output.noun} in {output.runtime}", 0, "")
            with clock.stage("load check"):
                job.loaded = output.load(made)
        if job.loaded:
            output.measure(job, made)
        verification, outfile = None, output.outfile
        if gate and output.rounds:
            with clock.stage("verify"):
                verification = gate(made, *output.compared_with(), output.outfile)
            if verification.verdict is Verdict.FAIL:
                outfile = rejected_path(outfile)
        with clock.stage("write"):
            made = output.divide(made, outfile)
            hashes = output.hashes(job, made)
            pinned.check()
            outfile = output.name(made, outfile)
    learning.end()
    forget_activations(output.outfile)
    seen = job.activations.report if job.activations else None
    warnings += seen.warnings if seen else ()
    warnings += [*output.late_warnings(), *(job.learned.warnings if job.learned else ())]
    report = ConversionReport(
        outfile=outfile,
        defense=request.defense if output.rounds else None,
        seed=job.seed if output.rounds else None,
        base_bytes=output.base_bytes(),
        out_bytes=output.out_bytes(outfile),
        hashes=hashes,
        seconds=clock.seconds,
        warnings=tuple(warnings),
        loaded=job.loaded,
        verification=verification,
        learned=job.learned,
        activations=seen,
        entropy_bits=output.entropy_bits(),
    )
    return output.report(report)
