"""The home of transformers for everything but the lab's model making: load a model to run it on text."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant_grids.errors import QGuardError


class HfLoadError(QGuardError):
    """transformers cannot load the model."""


@dataclass(frozen=True)
class HfModel:
    """A causal language model in evaluation mode, and its tokenizer.

    Attributes:
        model: a transformers model.
        tokenizer: its tokenizer.
        architecture: `model_type` of its config.
        layers: number of decoder blocks.
    """

    model: Any
    tokenizer: Any
    architecture: str
    layers: int


def load_hf_model(path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> HfModel:
    """Load a Hugging Face folder, or a full-precision GGUF of an architecture that transformers reads.

    Args:
        path: folder or .gguf file.
        dtype: of the weights in memory.
        device: where to put them; default CPU.

    Raises:
        HfLoadError: transformers cannot read it. No remote code is run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HfLoadError(f"transformers cannot load {path.name}: {reason}") from error
    model = model.eval().to(device or torch.device("cpu"))
    return HfModel(model, tokenizer, str(model.config.model_type), int(model.config.num_hidden_layers))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; errors are raised as ever."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
