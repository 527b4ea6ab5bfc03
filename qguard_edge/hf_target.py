"""The other job: model folder in, hardened Hugging Face folder out, for servers that run bitsandbytes.

    folder -> which modules (transformers) -> per tensor: plan, store -> config, card -> load check -> final name

Two kinds of output, one walk over the checkpoint:

* `nf4`, `fp4`, `int8`: a pre-quantized checkpoint with the chosen codes (`qguard_edge.bnb_rounding`);
* `hf`: full precision, moved so that the unmodified quantizer chooses these codes (`qguard_edge.moved_weights`), which is
  checked by really quantizing each matrix.

One tensor is worked on and one shard is held at a time. Everything is written into a hidden folder beside the output, which
gets its name at the end. What bitsandbytes would leave alone (output head, embeddings, norms) keeps its bytes.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.atomic import atomic_folder
from convert.bnb_check import require_bitsandbytes
from convert.bnb_layout import DTYPE_NAMES, quantization_config, stored_tensors
from convert.cores import available_cores
from convert.hf_folder import CONFIG_NAME, ShardWriter, copy_side_files, write_json
from convert.patch import sha256_of
from convert.tensor_io import single_threaded_torch
from qguard_edge.bnb_rounding import harden_matrix
from qguard_edge.defenses.base import Defense, SliceKey, make_defense
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.folder_learning import FolderTarget
from qguard_edge.folder_plan import DTYPES, FolderPlan, FolderRequest, plan_folder, source_bytes
from qguard_edge.guard import Guard
from qguard_edge.hf_runtime import continue_text
from qguard_edge.learned.checkpoint import Attempt, begin_attempt
from qguard_edge.learned.memory import fitted_defense
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.load_check import PROMPT, TOKENS, LoadCheck
from qguard_edge.model_card import CardFacts, write_card
from qguard_edge.moved_weights import move_weights
from qguard_edge.progress import Clock, NoProgress, Progress
from qguard_edge.rounding import resolve_device
from qguard_edge.verify.gate import Gate, rejected_path
from qguard_edge.verify.results import Outcome as Verification
from qguard_edge.verify.results import Verdict
from quant_grids import Outcome
from quant_grids.errors import FormatError

ENOUGH = 0.999  # share of codes that the unmodified quantizer must reproduce without a warning


@dataclass(frozen=True)
class MatrixRounding:
    """What became of one matrix in one format.

    Attributes:
        name: of the weight.
        kind: nf4, fp4 or int8.
        n_weights: in it.
        outcome: what the chosen codes change.
        given_up: `hf` only: weights that another format had moved out of the cell of their reference code.
        reproduced: `hf` only: codes that the unmodified quantizer gives as planned; None: not checked.
    """

    name: str
    kind: str
    n_weights: int
    outcome: Outcome
    given_up: int = 0
    reproduced: int | None = None


@dataclass(frozen=True)
class FolderReport:
    """What was done.

    Attributes:
        outfile: the finished folder.
        to: nf4, fp4, int8 or hf.
        kinds: formats that the codes were chosen for.
        defense: the rounding rule.
        seed: that was used.
        roundings: per matrix and format.
        kept_tensors: tensors that are not quantized.
        kept_weights: weights in them.
        moved_weights: `hf` only: weights that differ from the original.
        skipped: modules left out, as transformers matches them.
        base_bytes: tensor data read.
        out_bytes: tensor data written.
        hashes: SHA-256 of `base` (all weight files) and of each written weight file, by name.
        seconds: wall time of each stage.
        warnings: one sentence each.
        loaded: the load check's answer.
        learned: what a learned defense reports.
        verification: what `--verify` found; with a failing verdict `outfile` is `NAME.rejected`.
    """

    outfile: Path
    to: str
    kinds: tuple[str, ...]
    defense: DefenseOptions
    seed: int
    roundings: tuple[MatrixRounding, ...]
    kept_tensors: int
    kept_weights: int
    moved_weights: int | None
    skipped: tuple[str, ...]
    base_bytes: int
    out_bytes: int
    hashes: Mapping[str, str]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    loaded: LoadCheck | None = None
    learned: LearnReport | None = None
    verification: Verification | None = None


class _RejectedError(Exception):
    """Ends the making of a folder that failed its verification; carries the report."""

    def __init__(self, report: FolderReport) -> None:
        super().__init__()
        self.report = report


def convert_to_folder(
    request: FolderRequest, progress: Progress | None = None, gate: Gate | None = None, guard: Guard | None = None
) -> FolderReport:
    """Convert a model folder; on any error nothing is left under the final name.

    Args:
        request: what the user asked for.
        progress: told about each stage.
        gate: asked about the finished folder before it gets its name.
        guard: asked about the model before it is converted.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user.
    """
    plan = plan_folder(request)
    if request.check_loads:
        require_bitsandbytes()
    if guard:
        guard.before_folder(plan.source, plan.kinds)
    warnings = list(plan.warnings)
    request = replace(request, defense=fitted_defense(request, plan.size(), warnings))
    plan = replace(plan, warnings=tuple(warnings))
    attempt = begin_attempt(plan.outfile, request.defense, request.seed)
    try:
        with atomic_folder(plan.outfile, overwrite=request.overwrite, marker=CONFIG_NAME) as work:
            report = _FolderConversion(request, plan, work, progress or NoProgress(), gate, attempt).run()
            if report.outfile != plan.outfile:
                with atomic_folder(report.outfile, overwrite=True, marker=CONFIG_NAME) as rejected:
                    for made in work.iterdir():
                        made.rename(rejected / made.name)
                raise _RejectedError(report)
    except _RejectedError as rejection:
        report = rejection.report
    attempt.finish()
    return report


class _FolderConversion:
    """One conversion, stage by stage."""

    def __init__(
        self,
        request: FolderRequest,
        plan: FolderPlan,
        work: Path,
        progress: Progress,
        gate: Gate | None,
        attempt: Attempt,
    ) -> None:
        self.request, self.plan, self.work, self.progress, self.gate = request, plan, work, progress, gate
        self.seed, self.checkpoint = attempt.seed, attempt.checkpoint
        self.defense: Defense[Any] = make_defense(request.defense)
        self.device = resolve_device(request.device)
        self.clock = Clock()
        self.roundings: list[MatrixRounding] = []
        self.kept_tensors = self.kept_weights = self.moved = 0
        self.compute = torch.float32

    def run(self) -> FolderReport:
        """All stages; see the module docstring."""
        request, plan = self.request, self.plan
        sources = sorted({tensor.file for tensor in plan.checkpoint.tensors.values()})
        with ThreadPoolExecutor(1) as hashing:
            base_hash = hashing.submit(sha256_of, sources)
            learned = self._learn()
            with self.clock.stage("plan and write"):
                out_bytes, files = self._weights()
            hashes = {"base": base_hash.result(), **{file.name: sha256_of([file]) for file in files}}
        copy_side_files(plan.source.path, self.work)
        write_card(self.work, self._facts(hashes, learned))
        write_json(self.work / CONFIG_NAME, self._config())
        loaded = self._load_check()
        verification, outfile = None, plan.outfile
        if self.gate:
            with self.clock.stage("verify"):
                verification = self.gate(self.work, plan.source.path, plan.source.path, plan.outfile)
            if verification.verdict is Verdict.FAIL:
                outfile = rejected_path(plan.outfile)
        hf = request.to == "hf"
        return FolderReport(
            outfile=outfile,
            to=request.to,
            kinds=plan.kinds,
            defense=request.defense,
            seed=self.seed,
            roundings=tuple(self.roundings),
            kept_tensors=self.kept_tensors,
            kept_weights=self.kept_weights,
            moved_weights=self.moved if hf else None,
            skipped=plan.modules.skipped,
            base_bytes=sum(source_bytes(tensor) for tensor in plan.checkpoint.tensors.values()),
            out_bytes=out_bytes,
            hashes=hashes,
            seconds=self.clock.seconds,
            warnings=(*plan.warnings, *self._warnings(), *(learned.warnings if learned else ())),
            loaded=loaded,
            learned=learned,
            verification=verification,
        )

    def _learn(self) -> LearnReport | None:
        """Let a learned defense see the whole model; nothing for the others."""
        if not self.defense.learns:
            return None
        request, checkpoint = self.request, self.plan.checkpoint
        target = FolderTarget(
            self.plan, request.to, request.double_quant, lambda name: self._cast(checkpoint.read(name), name)
        )
        task = LearnTask(
            model=self.plan.source.path,
            target=target,
            seed=self.seed,
            device=self.device,
            calibration=request.calibration,
            checkpoint=self.checkpoint,
            threads=request.threads,
            progress=self.progress,
        )
        with self.clock.stage("learn"):
            return self.defense.prepare(task)

    def _weights(self) -> tuple[int, tuple[Path, ...]]:
        """Walk over the checkpoint and write every tensor."""
        plan = self.plan
        total = sum(tensor.elements for tensor in plan.checkpoint.tensors.values())
        self.progress.stage(f"Choosing the rounding ({self.request.defense.name})", total, "weights")
        writer = ShardWriter(self.work, self.request.shard_bytes)
        workers = 1 if self.device.type == "cuda" else self.request.threads or available_cores()
        with single_threaded_torch(), ThreadPoolExecutor(workers) as pool:
            for tensor in plan.checkpoint.tensors.values():
                value = self._cast(plan.checkpoint.read(tensor.name), tensor.name)
                module = plan.module_of(tensor)
                if module is None:
                    self.kept_tensors += 1
                    self.kept_weights += tensor.elements
                    writer.add({tensor.name: value})
                else:
                    writer.add(self._matrix(tensor.name, value, plan.modules.transposed[module], pool))
                self.progress.advance(tensor.elements, tensor.name)
            return writer.total_bytes, writer.finish()

    def _cast(self, value: Tensor, name: str) -> Tensor:
        if self.request.base_type is None or not value.is_floating_point():
            return value
        made = value.to(DTYPES[self.request.base_type])
        if bool(torch.isinf(made).any()) and not bool(torch.isinf(value).any()):
            largest = float(value.abs().max())
            raise FormatError(
                f"tensor {name} has values up to {largest:g}, beyond float16's 65504; use --base-type bf16 or f32"
            )
        return made

    def _matrix(self, name: str, value: Tensor, transposed: bool, pool: ThreadPoolExecutor) -> dict[str, Tensor]:
        """The tensors that stand for one matrix."""
        if not bool(torch.isfinite(value).all()):
            raise FormatError(f"tensor {name} holds values that are not finite; such a model cannot be quantized")
        weights = (value.t() if transposed else value).contiguous().to(self.device)
        self.compute = value.dtype
        if self.request.to == "hf":
            moved = self._move(name, weights, pool).cpu()
            return {name: moved.t() if transposed else moved}
        kind = self.request.to
        made = harden_matrix(
            weights,
            kind,
            self.defense,
            key=lambda index: SliceKey(self.seed, name, index),
            pool=pool,
            double_quant=self.request.double_quant,
        )
        self.roundings.append(MatrixRounding(name, kind, weights.numel(), made.outcome))
        shape = (weights.shape[0], weights.shape[1])
        stored = stored_tensors(name, made.grid, made.blocks, shape, value.dtype, made.nested)
        return {key: tensor.cpu() for key, tensor in stored.items()}

    def _move(self, name: str, weights: Tensor, pool: ThreadPoolExecutor) -> Tensor:
        moved = move_weights(
            weights,
            self.plan.kinds,
            self.defense,
            key=lambda kind, index: SliceKey(self.seed, f"{name} {kind}", index),
            pool=pool,
            check=self.request.check_loads,
        )
        self.moved += moved.n_moved
        for plan in moved.plans:
            self.roundings.append(
                MatrixRounding(name, plan.kind, weights.numel(), plan.outcome, plan.given_up, plan.reproduced)
            )
        return moved.weights

    def _config(self) -> Mapping[str, Any]:
        """config.json of the output; code that the original may have named is not copied, so not named either."""
        config = {key: value for key, value in self.plan.config.items() if key not in ("quantization_config", "auto_map")}
        if self.request.base_type is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = DTYPE_NAMES[DTYPES[self.request.base_type]]
        if self.request.to != "hf":
            skip = self.plan.modules.skipped if self.request.skip else None
            config["quantization_config"] = quantization_config(
                self.request.to, compute=self.compute, double_quant=self.request.double_quant, skip=skip
            )
        return config

    def _facts(self, hashes: Mapping[str, str], learned: LearnReport | None) -> CardFacts:
        outcomes: dict[str, tuple[Outcome, int]] = {}
        for rounding in self.roundings:
            before, weights = outcomes.get(rounding.kind, (Outcome(0, 0.0, 0.0, 0.0), 0))
            outcomes[rounding.kind] = (before + rounding.outcome, weights + rounding.n_weights)
        return CardFacts(
            name=self.plan.source.name,
            repo=self.request.model if "/" in self.request.model and not Path(self.request.model).exists() else None,
            source=self.plan.source.path,
            to=self.request.to,
            double_quant=self.request.double_quant,
            defense=self.request.defense,
            seed=self.seed,
            hashes=hashes,
            outcomes=outcomes,
            calibration_sha256=learned.calibration_sha256 if learned else None,
        )

    def _load_check(self) -> LoadCheck | None:
        if not self.request.check_loads:
            return None
        self.progress.stage("Loading the folder in transformers", 0, "")
        with self.clock.stage("load check"):
            text, ids = continue_text(self.work, PROMPT, TOKENS)
        return LoadCheck(PROMPT, text, ids)

    def _warnings(self) -> list[str]:
        made = []
        if self.request.to == "hf" and self.defense.requantizes:
            made.append(
                f"{self.request.defense.name} keeps the scales here (its fixed-grid mode): codes are to be reached on the "
                "folder's own scales"
            )
        for kind in self.plan.kinds:
            checked = [r for r in self.roundings if r.kind == kind and r.reproduced is not None]
            weights = sum(r.n_weights for r in checked)
            share = sum(r.reproduced or 0 for r in checked) / weights if weights else 1.0
            if share < ENOUGH:
                made.append(f"bitsandbytes reproduces only {share:.3%} of the {kind} codes that were chosen")
        return made
