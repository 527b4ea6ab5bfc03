"""Make an importance matrix: run the full-precision model on text and add up the squares of each matrix's inputs.

For a weight matrix that maps `x` to `W x`, the error of column j counts in proportion to the mean of `x_j^2`. Hooks on the
linear layers add up these squares over the text; the sums go into llama.cpp's own GGUF format under the names of the
GGUF's tensors, so that `llama-quantize` reads the file as well. The output matrix is left out, as llama-imatrix does.

Matrices that are not linear layers of their own in transformers (the stacked experts of mixture models) get no entry, and
the report names them: llama.cpp then quantizes those without weights, or refuses types that need them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor, nn

from convert.atomic import check_writable
from convert.imatrix_file import write_imatrix
from convert.source import resolve_source
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.hf import HfModel, load_hf_model
from quant_grids.errors import QGuardError

# Where the name of an architecture in transformers differs from llama.cpp's.
_ARCHITECTURES = {
    "mistral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "phi": "phi2",
    "gpt_bigcode": "starcoder",
}
_ARCHITECTURES |= {"gemma3_text": "gemma3"}


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
        progress: told about each chunk.

    Raises:
        ImatrixError: the text is empty or unreadable, or no matrix could be matched to a GGUF tensor.
    """
    progress = progress or NoProgress()
    check_writable(outfile)
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImatrixError(f"cannot read the text {text.name} as UTF-8: {error}") from error
    source = resolve_source(model, revision)
    loaded = load_hf_model(source.path, device=device)
    ids = loaded.tokenizer(content, add_special_tokens=False)["input_ids"]
    chunks = [ids[i : i + chunk_size] for i in range(0, len(ids), chunk_size)][:max_chunks]
    if not chunks:
        raise ImatrixError(f"{text.name} holds no text")
    collector = _Collector(loaded)
    progress.stage("Measuring activations", len(chunks), "chunks")
    with torch.inference_mode():
        for chunk in chunks:
            loaded.model(torch.tensor([chunk], device=loaded.model.device))
            progress.advance(1)
    sums, counts, missing = collector.results()
    write_imatrix(outfile, sums, counts, dataset=text.name, chunks=len(chunks), chunk_size=chunk_size)
    return ImatrixReport(outfile, len(sums), missing, sum(map(len, chunks)), len(chunks))


class _Collector:
    """Hooks on every linear layer that has a GGUF tensor; layers that share an input are measured once each."""

    def __init__(self, loaded: HfModel) -> None:
        name = _ARCHITECTURES.get(loaded.architecture, loaded.architecture)
        arch = next((arch for arch, known in MODEL_ARCH_NAMES.items() if known == name), None)
        if arch is None:
            raise ImatrixError(f"{loaded.architecture!r} has no tensor names in gguf; make the matrix with llama-imatrix")
        names = get_tensor_name_map(arch, loaded.layers)
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.missing: list[str] = []
        for path, module in loaded.model.named_modules():
            if not _is_linear(module) or path in ("lm_head", "embed_out"):
                continue
            tensor = names.get_name(path + ".weight", try_suffixes=(".weight",))
            if tensor is None:
                self.missing.append(path)
            else:
                module.register_forward_pre_hook(self._hook(tensor))
        self.missing += [path for path, p in loaded.model.named_parameters() if p.ndim == 3]

    def _hook(self, tensor: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            squares = (flat * flat).sum(0)
            self.sums[tensor] = self.sums[tensor] + squares if tensor in self.sums else squares
            self.tokens[tensor] = self.tokens.get(tensor, 0) + len(flat)

        return add

    def results(self) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
        """Sums f32 `[1, columns]` and counts f32 `[1]` per GGUF tensor, and what has no entry."""
        if not self.sums:
            raise ImatrixError("no linear layer of the model belongs to a GGUF tensor; make the matrix with llama-imatrix")
        sums = {name: values.float().cpu().numpy()[None] for name, values in self.sums.items()}
        counts = {name: np.array([count], np.float32) for name, count in self.tokens.items()}
        return sums, counts, tuple(self.missing)


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, or GPT-2's Conv1D, whose inputs mean the same."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
