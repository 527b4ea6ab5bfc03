"""A rounding plan, for two machines: `qguard-edge plan` where the model can run, `apply` where llama.cpp is.

laptop   qguard-edge convert MODEL --to q4_k --defense none     -> plain GGUF
GPU box  qguard-edge plan MODEL --base ... --plain ...          -> plan (torch and transformers only)
laptop   qguard-edge apply PLAN --plain ...                     -> hardened GGUF, every bit checked

Nothing here imports llama_cpp.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert.atomic import commit, work_folder
from convert.cores import available_cores
from convert.diff import FileDifference, compare_files
from convert.gguf_file import GgufFile, GgufModel
from convert.hashes import sha256_of
from convert.outputs import Written, writing
from convert.pinned import Pinned
from convert.source import open_base
from convert.split import SplitRule, in_one_piece
from qguard_edge import __version__
from qguard_edge.conversion.activations import CALIBRATION_SEED, Activations, activations_folder, see_activations
from qguard_edge.conversion.memory_limit import walk_limit
from qguard_edge.conversion.metadata import qguard_entries
from qguard_edge.conversion.outputs.base import Guard, Job, Output
from qguard_edge.conversion.plan_file import PlanError, PlanRecorder, apply_plan, read_plan, write_plan
from qguard_edge.conversion.report import ConversionReport, PlanReport
from qguard_edge.conversion.request import PlanRequest
from qguard_edge.conversion.shards import check_shard_names, commit_shards, cut
from qguard_edge.learned.calibration import load_calibration
from qguard_edge.learned.matrices import GgufTarget, Target
from qguard_edge.learned.memory import ModelSize, size_of_gguf
from qguard_edge.progress import Progress
from qguard_edge.rounding.gguf import (
    Coverage,
    TensorRounding,
    WalkOptions,
    coverage_of,
    harden,
    require_coverage,
    total_outcome,
)
from qguard_edge.runtimes.grams import wanted_weights
from qguard_edge.runtimes.hf import load_hf_model
from qguard_edge.runtimes.hf_grams import TransformersGramSource
from qguard_edge.runtimes.load_check import LoadCheck
from quant_grids.errors import UnsupportedError


class PlanOutput(Output[PlanRequest, PlanReport]):
    """See the module docstring."""

    noun = "plan"
    loads = False
    base: GgufModel
    plain: GgufFile
    coverage: Coverage
    roundings: tuple[TensorRounding, ...] = ()
    plain_hash = ""

    def choose_name(self) -> Path:
        """See `Output.choose_name`."""
        outfile = Path(self.request.outfile).expanduser()
        self.check_names(outfile)
        return outfile

    def inputs(self) -> tuple[Path | None, ...]:
        """See `Output.inputs`."""
        return (*super().inputs(), self.request.base, self.request.plain)

    def make_base(self, work: Path, progress: Progress) -> tuple[str, ...]:
        """See `Output.make_base`: base and plain are given."""
        self.base = open_base(self.request.base, allow_requantize=False, way_out=" as --base")
        self.plain = in_one_piece(self.request.plain, work)
        self.coverage = coverage_of(self.base, self.plain)
        require_coverage(self.coverage, self.request.allow_unprotected)
        return ()

    def base_files(self) -> list[Path]:
        """See `Output.base_files`."""
        return [shard.path for shard in self.base.shards]

    def scan(self, guard: Guard) -> None:
        """See `Output.scan`."""
        if guard.before(self.base) or guard.after(self.base, self.plain):
            raise UnsupportedError(
                "a plan cannot keep tensors in full precision, for the plain file has them quantized already; make that file "
                "anew with --tensor-type"
            )

    def size(self) -> ModelSize:
        """See `Output.size`."""
        return size_of_gguf(self.base)

    def see_activations(self, job: Job) -> Activations:
        """See `Output.see_activations`: in transformers, where the model that was given runs."""
        trust = self.request.trust_remote_code
        loaded = load_hf_model(self.source.path, device=job.device, trust_remote_code=trust)
        return see_activations(
            TransformersGramSource(loaded, self.base),
            wanted_weights(self.base),
            lambda: load_calibration(
                self.request.calibration, loaded, job.base_hash.result(), CALIBRATION_SEED, job.progress
            ),
            activations_folder(self.outfile),
            max_memory=self.request.max_memory,
            threads=self.request.threads,
            progress=job.progress,
        )

    def target(self) -> Target:
        """See `Output.target`."""
        return GgufTarget(self.base, self.plain, self.coverage.protected)

    def write(self, job: Job) -> Path:
        """See `Output.write`."""
        recorder = PlanRecorder(self.plain)
        with job.clock.stage("choose and write"):
            try:
                weights = sum(tensor.n_weights for tensor in self.coverage.protected)
                job.progress.stage(f"Choosing the rounding ({self.request.defense.name})", weights, "weights")
                self.roundings = harden(
                    self.base,
                    self.plain,
                    self.coverage.protected,
                    job.defense,
                    WalkOptions(
                        job.seed,
                        self.request.threads,
                        job.device,
                        inputs=job.activations.grams if job.activations else None,
                        max_memory=walk_limit(self.request),
                    ),
                    sink=recorder,
                    progress=job.progress,
                )
            finally:
                recorder.close()
            self.plain_hash = sha256_of([self.plain.path])
            hashes = {"base": job.base_hash.result(), "plain": self.plain_hash}
            seen = job.activations.report if job.activations else None
            entries = qguard_entries(__version__, self.request.defense, job.seed, hashes, self.roundings, job.learned, seen)
            header = {"plain_sha256": hashes["plain"], "options": asdict(self.request.defense), "metadata": entries}
            made = job.work / "plan.safetensors"
            write_plan(made, recorder.tensors(), header)
        return made

    def load(self, made: Path) -> LoadCheck:
        """See `Output.load`; never called, for a plan is no model."""
        raise UnsupportedError(f"{made.name} is a plan, not a model that could be loaded")

    def hashes(self, job: Job, made: Path) -> dict[str, str]:
        """See `Output.hashes`."""
        return {"base": job.base_hash.result(), "plain": self.plain_hash, "output": sha256_of([made])}

    def name(self, made: Path, outfile: Path) -> Path:
        """See `Output.name`."""
        commit(made, outfile)
        return outfile

    def base_bytes(self) -> int:
        """See `Output.base_bytes`."""
        return self.base.n_bytes

    def entropy_bits(self) -> float:
        """See `Output.entropy_bits`."""
        return sum(rounding.bits for rounding in self.roundings)

    def report(self, common: ConversionReport) -> PlanReport:
        """See `Output.report`."""
        return common.extended(
            PlanReport,
            tensors=len(self.roundings),
            weights=sum(tensor.n_weights for tensor in self.coverage.protected),
            outcome=total_outcome(self.roundings),
        )


@dataclass(frozen=True)
class ApplyReport:
    """What was written: the file, codes changed per tensor, the comparison with plain, and the plan's header."""

    outfile: Path
    changed: Mapping[str, int]
    difference: FileDifference
    header: Mapping[str, Any]


def apply_to(
    plan_path: Path,
    plain_path: Path,
    outfile: Path,
    *,
    overwrite: bool,
    progress: Progress,
    split: SplitRule | None = None,
) -> ApplyReport:
    """Write the hardened file of a plan and hold every bit of it against the plain file.

    Args:
        plan_path: the plan.
        plain_path: the file that it was made for, or the first shard of it.
        outfile: the output; its shards are named after it.
        overwrite: replace an existing output.
        progress: told about the tensors.
        split: cut the output; None: one file.

    Raises:
        PlanError: the plan does not belong to the plain file, or the output is not what the plan says.
        OutputError: the output exists or cannot be written.
        UnsupportedError: it is to be cut as a file in one piece is.
    """
    read = [plan_path, plain_path]
    if split:
        split.check()
    with writing([Written(outfile)], read, overwrite=overwrite):
        if split:
            check_shard_names([outfile], read, overwrite=overwrite)
        pinned = Pinned(read)
        plan, like = read_plan(plan_path), GgufModel(plain_path)
        if split and split.like_input and len(like.shards) == 1:
            raise UnsupportedError(f"--keep-split: {plain_path.name} is in one piece; give --split-max-size instead")
        with work_folder(outfile) as work:
            made = work / "hardened.gguf"
            changed = apply_plan(plan, in_one_piece(plain_path, work), made, progress)
            difference = compare_files(plain_path, made, threads=available_cores())
            if fault := difference.fault(changed):
                raise PlanError(f"{fault}; please report this")
            if split:
                made = cut(made, split, like, outfile.name)
            pinned.check()
            if split:
                outfile = commit_shards(made, outfile)
            else:
                commit(made, outfile)
    return ApplyReport(outfile, changed, difference, plan.header)
