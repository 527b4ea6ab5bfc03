"""What all outputs in GGUF have in common: their names and shards, where the base comes from, and the half beside it."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from convert.atomic import commit
from convert.base_gguf import other_halves, write_base, write_mmproj
from convert.disk import least_bytes, require_space
from convert.gguf_file import GgufModel
from convert.quantizer import QuantizeReport, check_tensor_types, quantize
from convert.source import kept_types, open_base, published
from qguard_edge.conversion.honest_size import require_no_fallback
from qguard_edge.conversion.naming import from_template, mmproj_path
from qguard_edge.conversion.outputs.base import Output
from qguard_edge.conversion.report import Report
from qguard_edge.conversion.request import QuantizeRequest
from qguard_edge.conversion.shards import check_shard_names, commit_shards, cut
from qguard_edge.learned.memory import ModelSize, size_of_gguf
from qguard_edge.progress import Progress
from qguard_edge.runtimes.load_check import LoadCheck, load_check, load_pair
from quant_grids.errors import UnsupportedError

Made = TypeVar("Made", bound=QuantizeRequest)


class GgufFamily(Output[Made, Report]):
    """What all GGUF outputs have in common: how they are named, and where the base comes from."""

    default_name = "{NAME}-{FTYPE}.gguf"
    base: GgufModel
    half: Path | None = None  # the vision or audio half, in the work folder

    def files_beside(self, outfile: Path) -> tuple[Path, ...]:
        """See `Output.files_beside`."""
        return (self._half_name(outfile),) if self.request.mmproj else ()

    @property
    def mmproj_made(self) -> Path | None:
        """The vision or audio half under its name, if it was written."""
        return self._half_name(self.outfile) if self.half else None

    def _half_name(self, outfile: Path) -> Path:
        """The vision or audio half is one file for all types that a model is quantized to: it has the model's name."""
        return mmproj_path(outfile, self.source.name, self.request.mmproj or "")

    def choose_name(self) -> Path:
        """See `Output.choose_name`."""
        request = self.request
        template = request.outfile or self.default_name.replace("{NAME}", self.source.name)
        outfile = from_template(template, request.options.file_type.name)
        self.check_names(outfile)
        return outfile

    def check_names(self, outfile: Path) -> None:
        """See `Output.check_names`."""
        super().check_names(outfile)
        if self.request.split is not None:
            check_shard_names((outfile, *self.files_beside(outfile)), self.inputs(), overwrite=self.request.overwrite)

    def inputs(self) -> tuple[Path | None, ...]:
        """See `Output.inputs`."""
        return (*super().inputs(), self.request.options.imatrix, self.request.converter)

    def make_base(self, work: Path, progress: Progress) -> tuple[str, ...]:
        """See `Output.make_base`: the input itself, or a GGUF written from the folder."""
        warnings = (*self._open_base(work, progress), *self._keep_published())
        options, split = self.request.options, self.request.split
        if split and split.like_input and len(self.base.shards) == 1:
            raise UnsupportedError(f"--keep-split: {self.source.name} is in one piece; give --split-max-size instead")
        check_tensor_types(options, self.base.tensors, self.source.name)
        if self.request.no_fallback:
            require_no_fallback(self.base, options, work)
        files = 2 if self.rounds else 1  # plain and the output stand side by side
        require_space(work, files * least_bytes(options.file_type, self.base.n_weights), f"a {options.file_type.name} file")
        return warnings

    def _keep_published(self) -> list[str]:
        """Have llama.cpp keep tensors of a type that the model is published in, where the user wants no second rounding."""
        kept = published(self.base)
        if not kept or self.request.options.allow_requantize:
            return []
        self.request = self.request.with_types(kept_types(kept))
        share = sum(tensor.n_weights for tensor in kept) / self.base.n_weights
        return [
            f"{len(kept)} tensors, {share:.0%} of the weights, are {kept[0].ggml_type.name} already and stay as they are: "
            "nothing is rounded there, and nothing protected"
        ]

    def _open_base(self, work: Path, progress: Progress) -> tuple[str, ...]:
        request = self.request
        if self.source.is_gguf:
            self.base = open_base(self.source.path, request.options.allow_requantize)
            if request.mmproj:
                raise UnsupportedError("--mmproj takes the vision or audio half from a model folder; a GGUF has none")
            if request.options.allow_requantize:
                return ("the input is already quantized: only what the second rounding adds is protected",)
            return ()
        path = work / "base.gguf"
        if request.base_type is None:
            weights = sum(file.stat().st_size for file in self.source.path.glob("*.safetensors"))
            require_space(work, weights, "the base in full precision")
        warnings = write_base(
            self.source,
            path,
            base_type=self.base_type(),
            pre=request.pre,
            converter=request.converter,
            progress=progress,
            trust_remote_code=request.trust_remote_code,
            allow_quantized=request.options.allow_requantize,
        )
        self.base = GgufModel(path)
        if request.mmproj:
            self.half = work / "mmproj.gguf"
            write_mmproj(
                self.source,
                self.half,
                request.mmproj,
                converter=request.converter,
                progress=progress,
                trust_remote_code=request.trust_remote_code,
            )
        elif halves := other_halves(self.source.path):
            warnings += (
                f"only the language half is written; --mmproj f16 writes the {' and '.join(halves)} half beside it",
            )
        return warnings

    def base_type(self) -> str | None:
        """Precision of a base written from a folder."""
        return self.request.base_type

    def base_files(self) -> list[Path]:
        """See `Output.base_files`."""
        return [shard.path for shard in self.base.shards]

    def size(self) -> ModelSize:
        """See `Output.size`."""
        return size_of_gguf(self.base)

    def quantize(self, base: Path, out: Path, progress: Progress) -> QuantizeReport:
        """llama.cpp quantizes a base."""
        options = self.request.options
        progress.stage(f"Quantizing with llama.cpp to {options.file_type.name}", len(self.base.tensors), "tensors")
        return quantize(base, out, options, progress=lambda _i, _n, name: progress.advance(1, name))

    def load(self, made: Path) -> LoadCheck:
        """See `Output.load`; with its vision or audio half, as llama.cpp's multimodal library loads the two."""
        loaded = load_check(made, threads=self.request.threads)
        return replace(loaded, halves=load_pair(made, self.half)) if self.half else loaded

    def base_bytes(self) -> int:
        """See `Output.base_bytes`."""
        return self.base.n_bytes

    def divide(self, made: Path, outfile: Path) -> Path:
        """See `Output.divide`: into shards, if the user asked for them."""
        return self._cut(made, outfile) if self.request.split else made

    def _cut(self, whole: Path, outfile: Path) -> Path:
        """Cut a file into shards beside it, compare them with it, and remove it."""
        assert self.request.split is not None
        return cut(whole, self.request.split, self.base, outfile.name, self.request.threads)

    def name(self, made: Path, outfile: Path) -> Path:
        """See `Output.name`: of shards the first one comes last, so that a model that can be found is complete."""
        if self.half:
            commit(self.half, self._half_name(self.outfile))
        return self._commit(made, outfile)

    def _commit(self, made: Path, outfile: Path) -> Path:
        if not self.request.split:
            commit(made, outfile)
            return outfile
        return commit_shards(made, outfile)
