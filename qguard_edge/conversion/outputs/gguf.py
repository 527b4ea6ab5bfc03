"""A hardened GGUF: llama.cpp quantizes the base, a defense chooses the codes, and nothing but code bits is written back."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from convert.child import resident_bytes
from convert.cores import available_cores
from convert.diff import compare_files
from convert.gguf_file import GgufFile
from convert.hashes import sha256_of
from convert.imatrix_file import load_imatrix
from convert.missing import require_llama
from convert.outputs import files_of
from convert.patch import GgufPatch
from convert.quantizer import QuantizeReport
from qguard_edge import __version__
from qguard_edge.conversion.activations import (
    CALIBRATION_SEED,
    Activations,
    activations_folder,
    idle_warning,
    see_activations,
    write_importance,
)
from qguard_edge.conversion.beside_plain import beside_plain, costs_little
from qguard_edge.conversion.feedback_cost import STAGE_NAMES, expected_stages, model_of, reference
from qguard_edge.conversion.honest_size import fallback_warning
from qguard_edge.conversion.memory_limit import require_memory, walk_limit
from qguard_edge.conversion.metadata import qguard_entries
from qguard_edge.conversion.naming import plain_path
from qguard_edge.conversion.outputs.base import Guard, Job
from qguard_edge.conversion.outputs.gguf_family import GgufFamily, Made
from qguard_edge.conversion.report import ConversionReport, GgufReport, Report
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.shards import SelfCheckError
from qguard_edge.learned.calibration import Calibration, load_calibration
from qguard_edge.learned.matrices import GgufTarget, Target
from qguard_edge.learned.memory import draws_alone
from qguard_edge.rounding.gguf import Coverage, TensorRounding, WalkOptions, coverage_of, harden, require_coverage
from qguard_edge.rounding.gguf_requantize import measure_requantized, write_moved_base
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.fidelity import BesidePlain
from qguard_edge.runtimes.grams import wanted_weights
from qguard_edge.runtimes.hf import load_hf_model


class HardenedGguf(GgufFamily[Made, Report]):
    """The stages from the base to a hardened GGUF in the work folder."""

    plain: GgufFile
    coverage: Coverage
    quantized: QuantizeReport
    roundings: tuple[TensorRounding, ...] = ()
    plain_hash = ""
    idle_experts: Mapping[str, tuple[int, ...]] = MappingProxyType({})

    def open(self) -> None:
        """See `Output.open`."""
        require_llama()
        super().open()
        if self.request.options.imatrix:
            load_imatrix(self.request.options.imatrix)  # a broken one is an error now, not after minutes

    def scan(self, guard: Guard) -> None:
        """See `Output.scan`."""
        self.request = self.request.with_types(guard.before(self.base))

    def see_activations(self, job: Job) -> Activations:
        """See `Output.see_activations`: in llama.cpp, on the base itself."""
        request, identity = self.request, job.base_hash.result()
        if request.max_memory is not None and draws_alone(request.defense):
            require_memory(self.base.tensors.values(), request.max_memory)
        job.progress.expect(self._expected())
        seen = see_activations(
            LlamaGramSource(self.base, identity=identity),
            wanted_weights(self.base),
            lambda: self._calibration(job),
            activations_folder(self.outfile),
            max_memory=request.max_memory,
            threads=request.threads,
            progress=job.progress,
        )
        self.idle_experts = seen.report.idle_experts
        return seen

    def _expected(self) -> tuple[tuple[str, float], ...]:
        """The stages to come, as `Progress.expect` takes them; the machine's speed shows on the way."""
        request, here = self.request, resident_bytes("RssAnon")
        stages = expected_stages(
            model_of(self.base, request.calibration),
            reference(request.threads or available_cores()),
            limit=request.max_memory,
            parent=here,
        )
        return tuple(stage for stage in stages if self.plain_wants_inputs() or stage[0] != STAGE_NAMES["plain"])

    def _calibration(self, job: Job) -> Calibration:
        """The text by the GGUF's own vocabulary and template; what the model is to write itself, through transformers."""
        # Not at the top: it brings llama.cpp into the process, which planning does without.
        from qguard_edge.learned.calibration_gguf import gguf_calibration

        options = self.request.calibration
        if options.self_written and not self.source.is_gguf:
            loaded = load_hf_model(self.source.path, device=job.device)
            return load_calibration(options, loaded, job.base_hash.result(), job.seed, job.progress)
        return gguf_calibration(self.base.path, options, CALIBRATION_SEED)

    def plain_wants_inputs(self) -> bool:
        """See `Output.plain_wants_inputs`: types that need an importance matrix, where none is given."""
        options = self.request.options
        return options.imatrix is None and options.file_type.needs_imatrix

    def make_plain(self, job: Job, guard: Guard | None) -> None:
        """See `Output.make_plain`; twice if the guard keeps tensors in full precision in the light of the first file."""
        path, options = job.work / "plain.gguf", self.request.options
        if job.activations and self.plain_wants_inputs():
            report = job.activations.report
            path_of_text = job.work / "calibration.imatrix.gguf"
            measured = write_importance(job.activations.grams, path_of_text, report.calibration_source, report.tokens)
            self.request = replace(self.request, options=replace(options, imatrix=measured))

        def make() -> None:
            with job.clock.stage("plain"):
                self.quantized = self.quantize(self.base.path, path, job.progress)
            self.plain = GgufFile(path)

        make()
        if guard:
            with job.clock.stage("scan"):
                types = guard.after(self.base, self.plain)
            if types:
                self.request = self.request.with_types(types)
                path.unlink()
                make()
        self.coverage = coverage_of(self.base, self.plain)
        require_coverage(self.coverage, self.request.allow_unprotected)

    def target(self) -> Target:
        """See `Output.target`."""
        return GgufTarget(self.base, self.plain, self.coverage.protected)

    def write(self, job: Job) -> Path:
        """See `Output.write`."""
        if job.defense.requantizes:
            with job.clock.stage("requantize"):
                return self._requantize(job)
        with job.clock.stage("choose and write"):
            made = self._patch(job)
        with job.clock.stage("self-check"):
            self._self_check(job, made)
        return made

    def _entries(self, job: Job, hashes: Mapping[str, str]) -> dict[str, bool | int | float | str]:
        seen = job.activations.report if job.activations else None
        return qguard_entries(__version__, self.request.defense, job.seed, hashes, self.roundings, job.learned, seen)

    def _patch(self, job: Job) -> Path:
        """Choose the codes and write them into a copy of plain, in one pass over the tensors."""
        made, tensors = job.work / "hardened.gguf", self.coverage.protected
        weights = sum(tensor.n_weights for tensor in tensors)
        job.progress.stage(f"Choosing the rounding ({self.request.defense.name})", weights, "weights")
        imatrix = self.request.options.imatrix
        patch = GgufPatch(self.plain, made, self._entries(job, {"base": "0" * 64, "plain": "0" * 64}))
        try:
            with ThreadPoolExecutor(1) as pool:
                plain_hash = pool.submit(sha256_of, [self.plain.path])
                self.roundings = harden(
                    self.base,
                    self.plain,
                    tensors,
                    job.defense,
                    WalkOptions(
                        job.seed,
                        self.request.threads,
                        job.device,
                        load_imatrix(imatrix) if imatrix else None,
                        job.activations.grams if job.activations else None,
                        walk_limit(self.request),
                    ),
                    sink=patch.write_rows,
                    progress=job.progress,
                )
                patch.copy_rest(tensor.name for tensor in tensors)
                self.plain_hash = plain_hash.result()
            patch.rewrite_metadata(self._entries(job, {"base": job.base_hash.result(), "plain": self.plain_hash}))
        finally:
            patch.close()
        return made

    def _requantize(self, job: Job) -> Path:
        """Move the weights, let llama.cpp quantize again, and measure the result against plain."""
        threads, progress, tensors = self.request.threads, job.progress, self.coverage.protected
        weights = sum(tensor.n_weights for tensor in tensors)
        moved, again, made = (job.work / f"{name}.gguf" for name in ("moved", "requantized", "hardened"))
        progress.stage(f"Moving the weights ({self.request.defense.name})", weights, "weights")
        write_moved_base(
            self.base, self.plain, tensors, job.defense, moved, seed=job.seed, threads=threads, progress=progress
        )
        self.quantized = self.quantize(moved, again, progress)
        moved.unlink()
        result = GgufFile(again)
        progress.stage("Measuring the result", weights, "weights")
        self.roundings = measure_requantized(self.base, self.plain, result, tensors, threads=threads, progress=progress)
        self.plain_hash = sha256_of([self.plain.path])
        entries = self._entries(job, {"base": job.base_hash.result(), "plain": self.plain_hash})
        patch = GgufPatch(result, made, entries)
        try:
            patch.copy_rest(())
        finally:
            patch.close()
        return made

    def _self_check(self, job: Job, made: Path) -> None:
        """Read the file back and hold every bit against plain and the chosen codes."""
        job.progress.stage("Checking every bit against plain", len(self.plain.tensors), "tensors")
        difference = compare_files(
            self.plain.path,
            made,
            threads=self.request.threads or available_cores(),
            progress=lambda _i, _n, name: job.progress.advance(1, name),
        )
        planned = {rounding.name: rounding.outcome.n_changed for rounding in self.roundings}
        if fault := difference.fault(planned):
            raise SelfCheckError(f"{fault}; please report this")

    def compared_with(self) -> tuple[Path, Path]:
        """See `Output.compared_with`."""
        return self.base.path, self.plain.path

    def entropy_bits(self) -> float:
        """See `Output.entropy_bits`."""
        return sum(rounding.bits for rounding in self.roundings)

    def late_warnings(self) -> list[str]:
        """See `Output.late_warnings`."""
        name, bits = self.request.options.file_type.name, bits_per_weight(self.plain)
        fallen = fallback_warning(self.quantized.fallbacks, self.base, name, bits)
        return [*self.quantized.warnings, *fallen, *idle_warning(self.idle_experts, self.base)]

    def hashes(self, job: Job, made: Path) -> dict[str, str]:
        """See `Output.hashes`."""
        return {"base": job.base_hash.result(), "plain": self.plain_hash, "output": sha256_of(files_of(made))}


def bits_per_weight(file: GgufFile) -> float:
    """Real bits per weight, over all tensors of a file."""
    tensors = file.tensors.values()
    return 8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_weights for tensor in tensors)


class GgufOutput(HardenedGguf[GgufRequest, GgufReport]):
    """See the module docstring."""

    beside_plain: BesidePlain | None = None
    not_measured = ""
    plain_made: Path | None = None
    kept: Path | None = None

    def files_beside(self, outfile: Path) -> tuple[Path, ...]:
        """See `Output.files_beside`."""
        return (*super().files_beside(outfile), *((plain_path(outfile),) if self.request.keep_plain else ()))

    def measure(self, job: Job, made: Path) -> None:
        """See `Output.measure`."""
        if self.request.fidelity and costs_little(job, self.base):
            self.beside_plain, self.not_measured = beside_plain(job, self.base, made, self.plain.path, self.request.threads)

    def late_warnings(self) -> list[str]:
        """See `Output.late_warnings`."""
        return [*super().late_warnings(), *([self.not_measured] if self.not_measured else [])]

    def divide(self, made: Path, outfile: Path) -> Path:
        """See `Output.divide`; a plain file that is kept is cut the same way."""
        if self.request.split and self.request.keep_plain:
            self.plain_made = self._cut(self.plain.path, plain_path(self.outfile))
        return super().divide(made, outfile)

    def name(self, made: Path, outfile: Path) -> Path:
        """See `Output.name`."""
        if self.request.keep_plain:
            self.kept = self._commit(self.plain_made or self.plain.path, plain_path(self.outfile))
        return super().name(made, outfile)

    def report(self, common: ConversionReport) -> GgufReport:
        """See `Output.report`."""
        return common.extended(
            GgufReport,
            file_type=self.request.options.file_type,
            plain=self.kept,
            mmproj=self.mmproj_made,
            coverage=self.coverage,
            roundings=self.roundings,
            quantized=self.quantized,
            beside_plain=self.beside_plain,
            bits_per_weight=bits_per_weight(self.plain),
        )
