"""The main job: model in, hardened GGUF out.

    source -> base GGUF -> reference GGUF -> plan + patch -> self-check -> load check -> final name

Everything before the last step happens in a hidden work folder beside the output, so that the final rename stays on one
file system; the folder goes away however the conversion ends. The library returns a `ConvertReport`; printing is the
command line's job.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.atomic import commit
from convert.compare import compare_files
from convert.cores import available_cores
from convert.gguf_file import GgufFile, GgufModel
from convert.imatrix import Imatrix, load_imatrix
from convert.patch import GgufPatch, sha256_of
from convert.quantizer import QuantizeReport
from qguard_edge import __version__
from qguard_edge.conversion import ConvertReport, ConvertRequest
from qguard_edge.defenses.base import make_defense
from qguard_edge.guard import Guard
from qguard_edge.learned.checkpoint import Attempt, begin_attempt
from qguard_edge.learned.memory import fitted_defense, size_of_gguf
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.learned.targets import GgufTarget
from qguard_edge.load_check import LoadCheck, load_check
from qguard_edge.metadata import qguard_entries
from qguard_edge.preparation import check_output, make_base, output_path, quantize_base, reference_path, work_folder
from qguard_edge.progress import Clock, NoProgress, Progress
from qguard_edge.requantize import measure_requantized, write_moved_base
from qguard_edge.rounding import (
    Coverage,
    TensorRounding,
    coverage_of,
    harden,
    require_coverage,
    resolve_device,
)
from qguard_edge.source import Source, resolve_source
from qguard_edge.verify.gate import Gate, rejected_path
from qguard_edge.verify.results import Verdict
from quant_grids.errors import QGuardError


class SelfCheckError(QGuardError):
    """The written file is not what the plan says; it was thrown away."""


def convert_model(
    request: ConvertRequest, progress: Progress | None = None, gate: Gate | None = None, guard: Guard | None = None
) -> ConvertReport:
    """Convert a model; on any error nothing is left under the final name.

    Args:
        request: what the user asked for.
        progress: told about each stage.
        gate: asked about the finished file before it gets its name; not asked about `--to f32|f16|bf16`.
        guard: asked about the model before it is converted; not asked about `--to f32|f16|bf16`.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user.
    """
    progress = progress or NoProgress()
    request.options.check()
    request.defense.check()
    request.calibration.check()
    source = resolve_source(request.model, request.revision)
    outfile = output_path(request, source)
    check_output(outfile, source, request)
    clock = Clock()
    with work_folder(outfile.parent) as work:
        warnings: list[str] = []
        with clock.stage("base"):
            base = make_base(source, request, work, progress, warnings)
        if request.options.file_type.base:
            return _finish_base(request, source, base, outfile, work, clock, progress, tuple(warnings))
        request = scanned_and_fitted(request, base, guard, clock, warnings)
        attempt = begin_attempt(outfile, request.defense, request.seed)
        report = Conversion(
            request=request,
            source=source,
            base=base,
            outfile=outfile,
            work=work,
            attempt=attempt,
            clock=clock,
            progress=progress,
            warnings=warnings,
            gate=gate,
            guard=guard,
        ).run()
    attempt.finish()
    return report


def scanned_and_fitted(
    request: ConvertRequest, base: GgufModel, guard: Guard | None, clock: Clock, warnings: list[str]
) -> ConvertRequest:
    """The request after the guard has looked at the base and the defense was fitted to the memory; adds to `warnings`."""
    if guard:
        with clock.stage("scan"):
            request = _with_types(request, guard.before(base))
    return replace(request, defense=fitted_defense(request, size_of_gguf(base), warnings))


def _with_types(request: ConvertRequest, types: tuple[tuple[str, str], ...]) -> ConvertRequest:
    """The request with types of certain tensors put before the user's own."""
    options = request.options
    return replace(request, options=replace(options, tensor_types=(*types, *options.tensor_types))) if types else request


def _finish_base(
    request: ConvertRequest,
    source: Source,
    base: GgufModel,
    outfile: Path,
    work: Path,
    clock: Clock,
    progress: Progress,
    warnings: tuple[str, ...],
) -> ConvertReport:
    """`--to f32|f16|bf16`: nothing is quantized, so there is nothing to defend."""
    made = base.path
    quantized = None
    if source.is_gguf:
        made = work / "converted.gguf"
        with clock.stage("convert"):
            quantized = quantize_base(base.path, made, request.options, progress, len(base.tensors))
    loaded = _load_check(made, request, clock, progress)
    with clock.stage("write"):
        hashes = {"output": sha256_of([made])}
        commit(made, outfile)
    return ConvertReport(
        outfile=outfile,
        reference=None,
        file_type=request.options.file_type,
        defense=None,
        seed=None,
        coverage=None,
        roundings=(),
        quantized=quantized,
        base_bytes=outfile.stat().st_size,
        out_bytes=outfile.stat().st_size,
        hashes=hashes,
        seconds=clock.seconds,
        warnings=warnings,
        loaded=loaded,
    )


def _load_check(path: Path, request: ConvertRequest, clock: Clock, progress: Progress) -> LoadCheck | None:
    if not request.check_loads:
        return None
    progress.stage("Loading the file in llama.cpp", 0, "")
    with clock.stage("load check"):
        return load_check(path, threads=request.options.threads)


@dataclass
class Conversion:
    """One quantizing conversion of a base that is there, stage by stage.

    Attributes:
        request: what the user asked for, `scanned_and_fitted`.
        source: what learned defenses run.
        base: full precision.
        outfile: the name that the result gets.
        work: folder for the files in between, on the same file system.
        attempt: seed and checkpoint; whoever made it finishes it.
        clock: of the stages.
        progress: told about each stage.
        warnings: so far; more are added.
        gate: asked about the finished file.
        guard: asked about llama.cpp's own file.
    """

    request: ConvertRequest
    source: Source
    base: GgufModel
    outfile: Path
    work: Path
    attempt: Attempt
    clock: Clock
    progress: Progress
    warnings: list[str]
    gate: Gate | None = None
    guard: Guard | None = None

    def __post_init__(self) -> None:
        self.seed = self.attempt.seed
        self.learned: LearnReport | None = None
        self.defense = make_defense(self.request.defense)
        imatrix = self.request.options.imatrix
        self.imatrix: Imatrix | None = load_imatrix(imatrix) if imatrix else None

    def run(self) -> ConvertReport:
        """All stages; see the module docstring."""
        device = resolve_device(self.request.device)
        with ThreadPoolExecutor(1) as pool:
            # Hashing the base costs a quarter second per gigabyte: do it while llama.cpp works.
            base_hash = pool.submit(sha256_of, [shard.path for shard in self.base.shards])
            reference_file = self.work / "reference.gguf"
            quantized = self._quantize_guarded(reference_file)
            reference, request = GgufFile(reference_file), self.request
            coverage = coverage_of(self.base, reference)
            require_coverage(coverage, request.allow_unprotected)
            if self.defense.requantizes:
                with self.clock.stage("requantize"):
                    made, roundings, hashes, quantized = self._requantize(reference, coverage, base_hash)
            else:
                with self.clock.stage("plan and patch"):
                    self._learn(reference, coverage, device)
                    made, roundings, hashes = self._patch(reference, coverage, base_hash, device)
                with self.clock.stage("self-check"):
                    self._self_check(reference, made, roundings)
        loaded = _load_check(made, request, self.clock, self.progress)
        verification, outfile = None, self.outfile
        if self.gate:
            with self.clock.stage("verify"):
                verification = self.gate(made, self.base.path, reference_file, self.outfile)
            if verification.verdict is Verdict.FAIL:
                outfile = rejected_path(self.outfile)
        kept = reference_path(self.outfile) if request.keep_reference else None
        with self.clock.stage("write"):
            hashes["output"] = sha256_of([made])
            if kept:
                commit(reference_file, kept)
            commit(made, outfile)
        return ConvertReport(
            outfile=outfile,
            reference=kept,
            file_type=request.options.file_type,
            defense=request.defense,
            seed=self.seed,
            coverage=coverage,
            roundings=roundings,
            quantized=quantized,
            base_bytes=self.base.n_bytes,
            out_bytes=outfile.stat().st_size,
            hashes=hashes,
            seconds=self.clock.seconds,
            warnings=(*self.warnings, *quantized.warnings),
            loaded=loaded,
            verification=verification,
            learned=self.learned,
        )

    def _quantize_guarded(self, out: Path) -> QuantizeReport:
        """llama.cpp's own file; twice if the guard keeps tensors in full precision in the light of the first."""

        def make() -> QuantizeReport:
            with self.clock.stage("reference"):
                return quantize_base(self.base.path, out, self.request.options, self.progress, len(self.base.tensors))

        quantized = make()
        if self.guard:
            with self.clock.stage("scan"):
                types = self.guard.after(self.base, GgufFile(out))
            if types:
                self.request = _with_types(self.request, types)
                out.unlink()
                quantized = make()
        return quantized

    def _learn(self, reference: GgufFile, coverage: Coverage, device: Any) -> None:
        """Let a learned defense see the whole model; nothing for the others."""
        if not self.defense.learns:
            return
        request = self.request
        task = LearnTask(
            model=self.source.path,
            target=GgufTarget(self.base, reference, coverage.protected),
            seed=self.seed,
            device=device,
            calibration=request.calibration,
            checkpoint=self.attempt.checkpoint,
            threads=request.options.threads,
            progress=self.progress,
        )
        self.learned = self.defense.prepare(task)
        self.warnings += self.learned.warnings

    def _entries(
        self, hashes: Mapping[str, str], roundings: tuple[TensorRounding, ...]
    ) -> dict[str, bool | int | float | str]:
        return qguard_entries(__version__, self.request.defense, self.seed, hashes, roundings, self.learned)

    def _patch(
        self, reference: GgufFile, coverage: Coverage, base_hash: "Future[str]", device: Any
    ) -> tuple[Path, tuple[TensorRounding, ...], dict[str, str]]:
        """Plan and patch in one pass over the tensors."""
        made = self.work / "hardened.gguf"
        weights = sum(tensor.n_weights for tensor in coverage.protected)
        self.progress.stage(f"Choosing the rounding ({self.request.defense.name})", weights, "weights")
        hashes = {"base": "0" * 64, "reference": "0" * 64}
        patch = GgufPatch(reference, made, self._entries(hashes, ()))
        try:
            with ThreadPoolExecutor(1) as pool:
                reference_hash = pool.submit(sha256_of, [reference.path])
                roundings = harden(
                    self.base,
                    reference,
                    coverage.protected,
                    self.defense,
                    seed=self.seed,
                    sink=patch.write_rows,
                    threads=self.request.options.threads,
                    device=device,
                    imatrix=self.imatrix,
                    progress=self.progress,
                )
                patch.copy_rest(tensor.name for tensor in coverage.protected)
                hashes = {"base": base_hash.result(), "reference": reference_hash.result()}
            patch.rewrite_metadata(self._entries(hashes, roundings))
        finally:
            patch.close()
        return made, roundings, hashes

    def _requantize(
        self, reference: GgufFile, coverage: Coverage, base_hash: "Future[str]"
    ) -> tuple[Path, tuple[TensorRounding, ...], dict[str, str], QuantizeReport]:
        """Move the weights, let llama.cpp quantize again, and measure the result against the first reference."""
        threads, defense = self.request.options.threads, self.request.defense
        weights = sum(tensor.n_weights for tensor in coverage.protected)
        self.progress.stage(f"Moving the weights ({defense.name})", weights, "weights")
        moved, again, made = self.work / "moved.gguf", self.work / "requantized.gguf", self.work / "hardened.gguf"
        write_moved_base(
            self.base,
            reference,
            coverage.protected,
            self.defense,
            moved,
            seed=self.seed,
            threads=threads,
            progress=self.progress,
        )
        quantized = quantize_base(moved, again, self.request.options, self.progress, len(self.base.tensors))
        moved.unlink()
        result = GgufFile(again)
        self.progress.stage("Measuring the result", weights, "weights")
        roundings = measure_requantized(
            self.base, reference, result, coverage.protected, threads=threads, progress=self.progress
        )
        hashes = {"base": base_hash.result(), "reference": sha256_of([reference.path])}
        patch = GgufPatch(result, made, qguard_entries(__version__, defense, self.seed, hashes, roundings))
        try:
            patch.copy_rest(())
        finally:
            patch.close()
        return made, roundings, hashes, quantized

    def _self_check(self, reference: GgufFile, made: Path, roundings: tuple[TensorRounding, ...]) -> None:
        """Read the file back and hold every bit against the reference and the plan."""
        self.progress.stage("Checking every bit against the reference", len(reference.tensors), "tensors")
        threads = self.request.options.threads or available_cores()
        difference = compare_files(
            reference.path, made, threads=threads, progress=lambda _i, _n, name: self.progress.advance(1, name)
        )
        planned = {rounding.name: rounding.outcome.n_changed for rounding in roundings}
        for tensor in difference.tensors:
            if tensor.foreign_bytes or tensor.codes_changed != planned.get(tensor.name, 0):
                raise SelfCheckError(
                    f"{tensor.name!r} was not written as planned ({tensor.codes_changed} codes changed, "
                    f"{planned.get(tensor.name, 0)} planned, {tensor.foreign_bytes} other bytes); please report this"
                )
        if difference.metadata:
            raise SelfCheckError(f"the metadata key {difference.metadata[0]!r} changed; please report this")
