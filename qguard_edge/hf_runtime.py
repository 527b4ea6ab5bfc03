"""The home of transformers for everything but the lab's model making: load a model to run it on text."""

import contextlib
import io
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class LinearModules:
    """What transformers has bitsandbytes quantize in a model.

    Attributes:
        transposed: module name -> whether its weight is stored input-first (Conv1D) and is transposed before it is quantized.
        skipped: modules left out, as transformers matches them: output head, tied weights, and what the user named.
    """

    transposed: dict[str, bool]
    skipped: tuple[str, ...]


def linear_modules(folder: Path, skip: Sequence[str] = ()) -> LinearModules:
    """Ask transformers, from the folder's config alone, which modules `load_in_4bit` and `load_in_8bit` would replace.

    Args:
        folder: the model folder.
        skip: more modules to leave out, in the notation of `llm_int8_skip_modules`: a prefix, a suffix or a pattern.

    Raises:
        HfLoadError: transformers does not know the model, or an entry of `skip` matches nothing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    try:
        with _quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HfLoadError(f"transformers cannot build the model of {folder.name} from its config: {reason}") from error
    linear = {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear or isinstance(module, Conv1D)
    }
    skipped = sorted(get_keys_to_not_convert(model))
    kept_wide = list(model._keep_in_fp32_modules or [])
    for entry in skip:
        if all(should_convert_module(name, [entry]) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise HfLoadError(f"--bnb-skip {entry!r} matches no linear module; their last names are {known}")
        skipped.append(entry)
    chosen = {name: flag for name, flag in linear.items() if should_convert_module(name, [*skipped, *kept_wide])}
    return LinearModules(chosen, tuple(skipped))


def exact_on_cpu(model: Any) -> Any:
    """Keep a model quantized by bitsandbytes on the exact path of a CPU; returns the model.

    With AVX512-BF16 the library would repack the weights and round their scales to bf16 at the first forward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_exactly(folder: Path) -> Any:
    """A folder as a user loads it (a pre-quantized one included), in evaluation mode, kept exact on CPUs.

    Raises:
        HfLoadError: transformers or bitsandbytes cannot load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            return exact_on_cpu(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval())
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HfLoadError(f"transformers cannot load {folder.name}: {reason}") from error


def continue_text(folder: Path, prompt: str, count: int) -> tuple[str, tuple[int, ...]]:
    """Load a folder as a user would and continue a prompt greedily: text and token ids.

    Raises:
        HfLoadError: transformers or bitsandbytes cannot load it or run it.
    """
    from transformers import AutoTokenizer

    model = load_exactly(folder)
    try:
        with _quiet(), torch.inference_mode():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            made = model.generate(**given, max_new_tokens=count, do_sample=False)
            ids = made[0, given["input_ids"].shape[1] :].tolist()
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HfLoadError(f"transformers cannot run the folder that was made: {reason}") from error
    return str(tokenizer.decode(ids)), tuple(ids)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; errors are raised as ever."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
