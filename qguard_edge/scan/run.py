"""From what the user asked for to a `Scan`: open the model, quantize what needs it, walk, and draw dose curves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.ftypes import FileType, parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.quantizer import QuantizeOptions, quantize
from convert.scratch import scratch_folder
from convert.source import resolve_source
from qguard_edge.progress import Progress
from qguard_edge.scan import dose
from qguard_edge.scan.limits import load_limits
from qguard_edge.scan.positions import CLOSED_FORM
from qguard_edge.scan.results import Scan
from qguard_edge.scan.scanner import scan_model
from qguard_edge.scan.tensors import open_model
from quant_grids.errors import UnsupportedError

BITSANDBYTES = ("int8", "nf4", "fp4")
DEFAULT_TYPES = ("q4_0", "q8_0", "int8", "nf4", "fp4")
"""Types whose boxes are looked for unless others are named; they need no quantization."""


@dataclass(frozen=True)
class ScanRequest:
    """What the user asked for.

    Attributes:
        model: folder, hub id or .gguf file.
        types: llama.cpp file types and formats of bitsandbytes, lower case.
        revision: of a hub id.
        deep: also measure dose curves.
        text: passages for them.
        threads: 0 for one per core.
    """

    model: str
    types: tuple[str, ...] = DEFAULT_TYPES
    revision: str | None = None
    deep: bool = False
    text: Path | None = None
    threads: int = 0


def run_scan(request: ScanRequest, progress: Progress) -> Scan:
    """Carry out a request.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user.
    """
    file_types = [parse_file_type(name) for name in request.types if name not in BITSANDBYTES]
    closed = [name for name in request.types if name in CLOSED_FORM]
    searched = [parse_file_type(name) for name in request.types if name not in CLOSED_FORM]
    for file_type in file_types:
        if file_type.base or file_type.needs_imatrix:
            why = "quantizes nothing" if file_type.base else "needs an importance matrix, which the scan does not take"
            raise UnsupportedError(f"--to {file_type.name} {why}; choose another type")
    if request.deep and not file_types:
        raise UnsupportedError("--deep measures llama.cpp's types; add one with --to, such as --to q4_k")
    source = resolve_source(request.model, request.revision)
    with open_model(source, need_base=bool(searched) or request.deep, progress=progress) as model:
        with _plain_files(model.base, searched, request.threads, progress) as plain_files:
            found = scan_model(model, closed, plain_files, threads=request.threads, progress=progress)
        if not request.deep:
            return found
        assert model.base is not None
        return _with_curves(found, model.base, file_types, request, progress)


@contextmanager
def _plain_files(
    base: GgufModel | None, types: Sequence[FileType], threads: int, progress: Progress
) -> Iterator[list[GgufFile]]:
    """llama.cpp's own files of some types, in a temporary folder."""
    with scratch_folder() as folder:
        files = []
        for file_type in types:
            assert base is not None
            outfile = folder / f"{file_type.name}.gguf"
            progress.stage(f"Quantizing with llama.cpp to {file_type.name}", len(base.tensors), "tensors")
            options = QuantizeOptions(file_type, threads=threads)
            quantize(base.path, outfile, options, progress=lambda _i, _n, name: progress.advance(1, name))
            files.append(GgufFile(outfile))
        yield files


def _with_curves(found: Scan, base: GgufModel, types: Sequence[FileType], request: ScanRequest, progress: Progress) -> Scan:
    curves, findings = [], []
    for file_type in types:
        curve = dose.dose_curve(base, file_type, texts=request.text, threads=request.threads, progress=progress)
        curves.append(curve)
        findings += dose.judge(curve, file_type.main, load_limits())
    return found.with_curves(tuple(curves), findings)
