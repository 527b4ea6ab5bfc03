"""Make an importance matrix: run the full-precision model on text and add up the squares of each matrix's inputs.

For a weight matrix that maps `x` to `W x`, the error of column j counts in proportion to the mean of `x_j^2`. llama.cpp runs the
model while every product's inputs are watched (`qguard_edge.runtimes.activations`), experts by their routes; the sums go into
llama.cpp's own GGUF format under the names of the GGUF's tensors, so that `llama-quantize` reads the file as well. As with
llama-imatrix, a model that expects a beginning-of-text token gets one before each piece of text, and only the matrices of blocks
are measured, not the output matrix.

A folder is first written as a base GGUF beside the output, and removed at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from convert.atomic import check_writable, work_folder
from convert.base_gguf import write_base
from convert.gguf_file import GgufModel
from convert.imatrix_file import write_imatrix
from convert.reading import read_text
from convert.source import Source, resolve_source
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.fidelity import LARGEST_TEXT
from qguard_edge.runtimes.grams import wanted_weights
from qguard_edge.runtimes.tokens import llama_tokens
from quant_grids.errors import QGuardError

ALL_LAYERS = 10_000


class ImatrixError(QGuardError):
    """No importance matrix can be made from this model and text."""


@dataclass(frozen=True)
class ImatrixReport:
    """What was measured.

    Attributes:
        outfile: the importance matrix.
        entries: matrices in it.
        missing: weight matrices of the model without an entry.
        tokens: of the text that were used.
        chunks: pieces that the text was cut into.
    """

    outfile: Path
    entries: int
    missing: tuple[str, ...]
    tokens: int
    chunks: int


def make_imatrix(
    model: str,
    text: Path,
    outfile: Path,
    *,
    revision: str | None = None,
    chunk_size: int = 512,
    max_chunks: int = 100,
    device: torch.device | None = None,
    converter: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ImatrixReport:
    """Measure a model on a text file and write the importance matrix.

    Args:
        model: folder, hub id or full-precision .gguf.
        text: UTF-8 text.
        outfile: the GGUF to write, replaced atomically.
        revision: of a hub id.
        chunk_size: tokens per forward pass.
        max_chunks: pieces of text to use at most.
        device: where the model runs.
        converter: for a folder of an architecture that is not built in, as for `convert`.
        trust_remote_code: let that converter read a folder that brings Python code.
        progress: told about each chunk.

    Raises:
        ImatrixError: the text is empty or unreadable, or no matrix could be matched to a GGUF tensor.
    """
    progress = progress or NoProgress()
    check_writable(outfile)
    try:
        content = read_text(text, LARGEST_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise ImatrixError(f"cannot read the text {text.name} as UTF-8: {error}") from error
    source = resolve_source(model, revision)
    with work_folder(outfile) as place:
        path = place / "base.gguf"
        base = GgufModel(_base_of(source, path, progress, converter=converter, trust_remote_code=trust_remote_code))
        chunks = _chunks(base, content, chunk_size)[:max_chunks]
        if not chunks:
            raise ImatrixError(f"{text.name} holds no text")
        layers = ALL_LAYERS if device is not None and device.type == "cuda" else 0
        seen = LlamaGramSource(base, products=False, gpu_layers=layers, way_out="")
        weights = wanted_weights(base, [name for name in base.tensors if name.startswith("blk.")])
        grams = seen.collect(weights, chunks, place / "sums", progress=progress)
        if not grams.names:
            raise ImatrixError(f"no product of {source.name} reads a matrix of a block: there is nothing to measure")
        measured = {name: grams.diagonal(name) for name in grams.names}
    sums = {name: found.squares for name, found in measured.items()}
    counts = {name: found.counts for name, found in measured.items()}
    write_imatrix(outfile, sums, counts, dataset=text.name, chunks=len(chunks), chunk_size=chunk_size)
    return ImatrixReport(outfile, len(sums), grams.missing, sum(map(len, chunks)), len(chunks))


def _base_of(source: Source, path: Path, progress: Progress, *, converter: Path | None, trust_remote_code: bool) -> Path:
    """The model's own GGUF, or one written at `path`."""
    if source.is_gguf:
        return source.path
    warnings = write_base(
        source, path, base_type=None, pre=None, converter=converter, progress=progress, trust_remote_code=trust_remote_code
    )
    for warning in warnings:
        progress.note(warning)
    return path


def _chunks(base: GgufModel, content: str, size: int) -> Sequence[Sequence[int]]:
    """The text cut into pieces of `size` tokens, what the model expects before a text included."""
    tokens = llama_tokens(base.path, [content])
    ids, begin = tokens.texts[0], tokens.begin
    step = max(1, size - len(begin))
    return [(*begin, *ids[start : start + step]) for start in range(0, len(ids), step)]
