"""The home of bitsandbytes through transformers: which modules it replaces, and folders loaded as a server loads them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qguard_edge.runtimes.hf import HfLoadError, first_line, quiet, require_sound


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

    require_sound(folder)
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a config of foreign origin makes it raise
        raise HfLoadError(
            f"transformers cannot build the model of {folder.name} from its config: {first_line(error)}"
        ) from error
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

    With AVX512-BF16 the library would repack the weights and round their scales to bf16 at the first forward pass. Its
    warning that INT8 casts the inputs, which it repeats at every product, is turned off.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_exactly(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | None = None, kind: str | None = None
) -> Any:
    """A folder as a user loads it (a pre-quantized one included), in evaluation mode, kept exact on CPUs.

    Args:
        folder: to load; its safetensors, no other weights.
        dtype: of what is not quantized; None: the folder's own.
        device: where to put it; None: where transformers does.
        kind: let bitsandbytes round it while it is loaded: nf4, fp4 or int8.

    Raises:
        HfLoadError: transformers or bitsandbytes cannot load it.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    require_sound(folder)
    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
    if dtype is not None:
        options["dtype"] = dtype
    if kind == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif kind is not None:
        computed = {"bnb_4bit_compute_dtype": dtype} if dtype is not None else {}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, **computed)
    if device is not None:
        options["device_map"] = {"": device}
    try:
        with quiet():
            return exact_on_cpu(AutoModelForCausalLM.from_pretrained(folder, **options).eval())
    except Exception as error:  # whatever a config of foreign origin makes it raise
        raise HfLoadError(f"transformers cannot load {folder.name}: {first_line(error)}") from error


def continue_text(folder: Path, prompt: str, count: int) -> tuple[str, tuple[int, ...]]:
    """Load a folder as a user would and continue a prompt greedily: text and token ids.

    Raises:
        HfLoadError: transformers or bitsandbytes cannot load it or run it.
    """
    from transformers import AutoTokenizer

    model = load_exactly(folder)
    try:
        with quiet(), torch.inference_mode():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            made = model.generate(**given, max_new_tokens=count, do_sample=False)
            ids = made[0, given["input_ids"].shape[1] :].tolist()
    except Exception as error:  # whatever a config of foreign origin makes it raise
        raise HfLoadError(f"transformers cannot run the folder that was made: {first_line(error)}") from error
    return str(tokenizer.decode(ids)), tuple(ids)
