"""A pre-quantized folder for servers that run bitsandbytes (`--to nf4|fp4|int8`), its codes chosen by a defense.

One walk over the checkpoint: one tensor is worked on and one shard is held at a time. What bitsandbytes would leave alone
(output head, embeddings, norms) keeps its bytes. `moved_folder` is the full-precision counterpart.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.atomic import OutputError, check_folder_writable, commit_folder
from convert.bnb_check import require_bitsandbytes
from convert.bnb_layout import DTYPE_NAMES, quantization_config, stored_tensors
from convert.cores import available_cores
from convert.hashes import sha256_of
from convert.hf_folder import CONFIG_NAME, ShardWriter, copy_side_files, write_json
from convert.outputs import check_not_inside
from convert.tensor_io import single_threaded_torch
from qguard_edge.conversion.activations import CALIBRATION_SEED, Activations, activations_folder, see_activations
from qguard_edge.conversion.folder_matrices import FolderTarget
from qguard_edge.conversion.model_card import CardFacts, write_card
from qguard_edge.conversion.naming import from_template
from qguard_edge.conversion.opened_folder import OpenedFolder, open_folder
from qguard_edge.conversion.outputs.base import Guard, Job, Output
from qguard_edge.conversion.report import ConversionReport, FolderReport, MatrixRounding
from qguard_edge.conversion.request import DTYPES, FolderRequest
from qguard_edge.defenses.base import SliceKey
from qguard_edge.learned.calibration import load_calibration
from qguard_edge.learned.matrices import Target
from qguard_edge.learned.memory import ModelSize
from qguard_edge.progress import Progress
from qguard_edge.rounding.bnb import harden_matrix
from qguard_edge.runtimes.bnb import continue_text
from qguard_edge.runtimes.gram_files import WantedWeight
from qguard_edge.runtimes.hf import load_hf_model
from qguard_edge.runtimes.hf_grams import TransformersGramSource
from qguard_edge.runtimes.load_check import PROMPT, TOKENS, LoadCheck
from quant_grids import Outcome
from quant_grids.errors import FormatError

NOT_COPIED = ("quantization_config", "auto_map", "_name_or_path")


class FolderOutput(Output[FolderRequest, FolderReport]):
    """See the module docstring."""

    noun, runtime = "folder", "transformers"
    opened: OpenedFolder

    def __init__(self, request: FolderRequest) -> None:
        super().__init__(request)
        self.roundings: list[MatrixRounding] = []
        self.files: tuple[Path, ...] = ()
        self.made_hashes: dict[str, str] = {}
        self.kept_tensors = self.kept_weights = self.written_bytes = 0
        self.compute = torch.float32

    def open(self) -> None:
        """See `Output.open`."""
        super().open()
        self.opened = open_folder(self.source, self.request.to, self.request.skip)
        self.warnings += self.opened.warnings

    def choose_name(self) -> Path:
        """See `Output.choose_name`."""
        request, source = self.request, self.source.path.resolve()
        outfile = from_template(request.outfile or f"{self.source.name}-{{FTYPE}}", request.to)
        if not self.source.is_gguf and (
            outfile.resolve().is_relative_to(source) or source.is_relative_to(outfile.resolve())
        ):
            raise OutputError(
                f"the output {outfile.name} and the input lie in one another; choose another name with --outfile"
            )
        self.check_names(outfile)
        return outfile

    def check_names(self, outfile: Path) -> None:
        """See `Output.check_names`."""
        check_folder_writable(outfile, overwrite=self.request.overwrite, marker=CONFIG_NAME)
        check_not_inside(outfile, self.inputs())

    def make_base(self, work: Path, progress: Progress) -> tuple[str, ...]:
        """See `Output.make_base`: the folder itself."""
        if self.request.check_loads:
            require_bitsandbytes()
        return ()

    def base_files(self) -> list[Path]:
        """See `Output.base_files`."""
        return sorted({tensor.file for tensor in self.opened.checkpoint.tensors.values()})

    def scan(self, guard: Guard) -> None:
        """See `Output.scan`."""
        guard.folder(self.source, self.request.kinds)

    def size(self) -> ModelSize:
        """See `Output.size`."""
        return self.opened.size()

    def see_activations(self, job: Job) -> Activations | None:
        """See `Output.see_activations`: in transformers, whose names the matrices have."""
        loaded = load_hf_model(self.source.path, device=job.device)
        matrices = FolderTarget(self.opened, self.request.to, self.request.double_quant, self._read).matrices
        return see_activations(
            TransformersGramSource(loaded),
            tuple(WantedWeight(matrix.name, matrix.columns) for matrix in matrices),
            lambda: load_calibration(
                self.request.calibration, loaded, job.base_hash.result(), CALIBRATION_SEED, job.progress
            ),
            activations_folder(self.outfile),
            max_memory=self.request.max_memory,
            threads=self.request.threads,
            progress=job.progress,
        )

    def target(self) -> Target | None:
        """See `Output.target`."""
        return FolderTarget(self.opened, self.request.to, self.request.double_quant, self._read)

    def _read(self, name: str) -> Tensor:
        return self._cast(self.opened.checkpoint.read(name), name)

    def write(self, job: Job) -> Path:
        """See `Output.write`."""
        made = job.work / "folder"
        made.mkdir()
        with job.clock.stage("choose and write"):
            self._weights(job, made)
            self.made_hashes = {"base": job.base_hash.result(), **{file.name: sha256_of([file]) for file in self.files}}
            copy_side_files(self.source.path, made)
            write_card(made, self._facts(job))
            write_json(made / CONFIG_NAME, self._config())
        return made

    def _weights(self, job: Job, made: Path) -> None:
        """Walk over the checkpoint and write every tensor."""
        opened = self.opened
        total = sum(tensor.elements for tensor in opened.checkpoint.tensors.values())
        job.progress.stage(f"Choosing the rounding ({self.request.defense.name})", total, "weights")
        writer = ShardWriter(made, self.request.shard_bytes)
        workers = 1 if job.device.type == "cuda" else self.request.threads or available_cores()
        with single_threaded_torch(), ThreadPoolExecutor(workers) as pool:
            for tensor in opened.checkpoint.tensors.values():
                value = self._read(tensor.name)
                module = opened.module_of(tensor)
                if module is None:
                    self.kept_tensors += 1
                    self.kept_weights += tensor.elements
                    writer.add({tensor.name: value})
                else:
                    writer.add(self._matrix(tensor.name, value, opened.modules.transposed[module], job, pool))
                job.progress.advance(tensor.elements, tensor.name)
            self.written_bytes, self.files = writer.total_bytes, writer.finish()

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

    def _matrix(self, name: str, value: Tensor, transposed: bool, job: Job, pool: ThreadPoolExecutor) -> dict[str, Tensor]:
        """The tensors that stand for one matrix."""
        if not bool(torch.isfinite(value).all()):
            raise FormatError(f"tensor {name} holds values that are not finite; such a model cannot be quantized")
        self.compute = value.dtype
        weights = (value.t() if transposed else value).contiguous().to(job.device)
        return self._rounded(name, weights, transposed, job, pool)

    def _rounded(
        self, name: str, weights: Tensor, transposed: bool, job: Job, pool: ThreadPoolExecutor
    ) -> dict[str, Tensor]:
        """The tensors of a matrix, output rows first, with chosen codes."""
        kind = self.request.to
        made = harden_matrix(
            weights,
            kind,
            job.defense,
            key=lambda index: SliceKey(job.seed, name, index),
            pool=pool,
            double_quant=self.request.double_quant,
            inputs=job.activations.grams if job.activations else None,
        )
        self.roundings.append(MatrixRounding(name, kind, weights.numel(), made.outcome, bits=made.bits))
        shape = (weights.shape[0], weights.shape[1])
        stored = stored_tensors(name, made.grid, made.blocks, shape, weights.dtype, made.nested)
        return {key: tensor.cpu() for key, tensor in stored.items()}

    def _config(self) -> dict[str, Any]:
        """config.json of the output; code that the original may have named, and where it was made, are not told."""
        config = {key: value for key, value in self.opened.config.items() if key not in NOT_COPIED}
        if self.request.base_type is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = DTYPE_NAMES[DTYPES[self.request.base_type]]
        return config | self._quantization()

    def _quantization(self) -> dict[str, Any]:
        """What config.json says about the quantization."""
        request = self.request
        skip = self.opened.modules.skipped if request.skip else None
        config = quantization_config(request.to, compute=self.compute, double_quant=request.double_quant, skip=skip)
        return {"quantization_config": config}

    def _facts(self, job: Job) -> CardFacts:
        outcomes: dict[str, tuple[Outcome, int]] = {}
        for rounding in self.roundings:
            before, weights = outcomes.get(rounding.kind, (Outcome.zero(), 0))
            outcomes[rounding.kind] = (before + rounding.outcome, weights + rounding.n_weights)
        request = self.request
        return CardFacts(
            name=self.source.name,
            repo=request.model if "/" in request.model and not Path(request.model).exists() else None,
            source=self.source.path,
            to=request.to,
            double_quant=request.double_quant,
            defense=request.defense,
            seed=job.seed,
            hashes=self.made_hashes,
            outcomes=outcomes,
            calibration_sha256=job.learned.calibration_sha256 if job.learned else None,
        )

    def load(self, made: Path) -> LoadCheck:
        """See `Output.load`."""
        text, ids = continue_text(made, PROMPT, TOKENS)
        return LoadCheck(PROMPT, text, ids)

    def hashes(self, job: Job, made: Path) -> dict[str, str]:
        """See `Output.hashes`."""
        return self.made_hashes

    def name(self, made: Path, outfile: Path) -> Path:
        """See `Output.name`."""
        commit_folder(made, outfile)
        return outfile

    def base_bytes(self) -> int:
        """See `Output.base_bytes`."""
        return self.opened.n_bytes

    def out_bytes(self, outfile: Path) -> int:
        """See `Output.out_bytes`: tensor data alone."""
        return self.written_bytes

    def entropy_bits(self) -> float:
        """See `Output.entropy_bits`."""
        return sum(rounding.bits for rounding in self.roundings)

    def report(self, common: ConversionReport) -> FolderReport:
        """See `Output.report`."""
        return common.extended(
            FolderReport,
            to=self.request.to,
            kinds=self.request.kinds,
            roundings=tuple(self.roundings),
            kept_tensors=self.kept_tensors,
            kept_weights=self.kept_weights,
            moved_weights=self.moved_weights(),
            skipped=self.opened.modules.skipped,
        )

    def moved_weights(self) -> int | None:
        """Weights that differ from the original; None where weights are stored as codes."""
        return None
