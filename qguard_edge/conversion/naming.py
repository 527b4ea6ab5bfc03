"""What comes before quantizing: the output's name, the work folder beside it, and the full-precision base.

The base is the input itself, or a GGUF written from a Hugging Face folder, built in or by llama.cpp's own converter.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.atomic import PREFIX, OutputError, check_writable
from convert.gguf_file import GgufModel
from convert.quantizer import QuantizeOptions, QuantizeReport, quantize
from convert.source import Source, open_base
from qguard_edge.conversion.request import ConvertRequest
from qguard_edge.progress import Progress


def output_path(request: ConvertRequest, source: Source) -> Path:
    """The final name of the output."""
    name = request.options.file_type.name
    template = request.outfile or f"{source.name}-{{FTYPE}}.gguf"
    return Path(template.replace("{ftype}", name.lower()).replace("{FTYPE}", name)).expanduser()


def reference_path(outfile: Path) -> Path:
    """Where `--keep-reference` puts llama.cpp's own file."""
    return outfile.with_name(f"{outfile.stem}.reference{outfile.suffix}")


def check_output(outfile: Path, source: Source, request: ConvertRequest) -> None:
    """Refuse an output that cannot be written or must not be replaced, before any work is done."""
    check_writable(outfile)
    targets = [outfile] + ([reference_path(outfile)] if request.keep_reference else [])
    for target in targets:
        if source.is_gguf and target.exists() and target.samefile(source.path):
            raise OutputError(f"input and output are the same file, {target.name}; choose another with --outfile")
        if target.exists() and not request.overwrite:
            raise OutputError(f"{target.name} exists; pass --overwrite to replace it or choose another with --outfile")


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder beside the output, removed at the end."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise OutputError(f"the output folder {parent} cannot be written: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_base(source: Source, request: ConvertRequest, work: Path, progress: Progress, warnings: list[str]) -> GgufModel:
    """The full-precision GGUF: the input itself, or one written from the folder."""
    if source.is_gguf:
        base = open_base(source.path, request.options.allow_requantize)
        if request.options.allow_requantize:
            warnings.append("the input is already quantized: only what the second rounding adds is protected")
        return base
    path = work / "base.gguf"
    base_type = request.base_type
    if request.options.file_type.base:
        base_type = request.options.file_type.name.lower()
    warnings += write_base(source, path, request, base_type, progress)
    return GgufModel(path)


def quantize_base(base: Path, out: Path, options: QuantizeOptions, progress: Progress, count: int) -> QuantizeReport:
    """llama.cpp quantizes a base of `count` tensors."""
    progress.stage(f"Quantizing with llama.cpp to {options.file_type.name}", count, "tensors")
    return quantize(base, out, options, progress=lambda _i, _n, name: progress.advance(1, name))


def rejected_path(outfile: Path) -> Path:
    """The name of a file that failed: `NAME.rejected.gguf`; of a folder `NAME.rejected`."""
    if outfile.suffix != ".gguf":
        return outfile.with_name(f"{outfile.name}.rejected")
    return outfile.with_name(f"{outfile.stem}.rejected{outfile.suffix}")
