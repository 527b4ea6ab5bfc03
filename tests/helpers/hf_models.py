"""Small random-weight models, one per case of a family, made from transformers' own configuration classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCABULARY = 384
HIDDEN = 256
PROMPTS = (
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog 42 times.",
    "Once upon a time, there was a small model with random weights that nobody had trained; it said nothing.",
)

STANDARD: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GPT2_STYLE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOLERANCE = 1e-5
# llama.cpp reads GELU from a table of half-precision values, which limits how well these models can agree.
GELU_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A configuration worth converting.

    Attributes:
        name: Test id.
        config: Name of the transformers configuration class.
        options: Its arguments.
        family: The built-in family expected to take it.
        tolerance: Largest |difference of logits| allowed, relative to the largest |logit| of the prompt.
        model: Model class, when it is not the configuration's obvious one.
        edit: Change to config.json after saving, to write it as older versions did.
        warns: A part of a warning that must be given.
        seed: Seed of the weights; another one where two logits of the reference are closer than the
            tolerance.
    """

    name: str
    config: str
    options: dict[str, Any]
    family: str
    tolerance: float = TOLERANCE
    model: str = ""
    edit: Callable[[dict[str, Any]], None] | None = None
    warns: str = ""
    seed: int = 0

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.model or self.config.removesuffix("Config") + "ForCausalLM")


def rope(kind: str = "default", theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


def old_rope(config: dict[str, Any]) -> None:
    """Rewrites `rope_parameters` as `rope_theta` and `rope_scaling`, which transformers 4 wrote."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}


def old_gemma3_rope(config: dict[str, Any]) -> None:
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    config["rope_scaling"] = {"rope_type": "linear", "factor": parameters["full_attention"]["factor"]}
    config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    config.pop("layer_types")


LLAMA3 = rope(
    "llama3",
    500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONG = [1.0 + 0.1 * i for i in range(24)]
SHORT = [1.0 + 0.01 * i for i in range(24)]
LONGROPE = rope("longrope", short_factor=SHORT, long_factor=LONG, partial_rotary_factor=0.75)
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
}
MIXED_WINDOWS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


def standard(**changes: Any) -> dict[str, Any]:
    return {**STANDARD, **changes}


def gemma(**changes: Any) -> dict[str, Any]:
    return standard(head_dim=64, query_pre_attn_scalar=64, **changes)


CASES: tuple[Case, ...] = (
    Case("llama", "LlamaConfig", standard(), "Llama"),
    Case("llama-tied-mha", "LlamaConfig", standard(num_key_value_heads=4, tie_word_embeddings=True), "Llama"),
    Case("llama-biases", "LlamaConfig", standard(attention_bias=True, mlp_bias=True), "Llama"),
    Case("llama-head-dim", "LlamaConfig", standard(head_dim=128), "Llama"),
    Case("llama3", "LlamaConfig", standard(**LLAMA3), "Llama"),
    Case("llama3-old-config", "LlamaConfig", standard(**LLAMA3), "Llama", edit=old_rope),
    Case("deepseek-coder", "LlamaConfig", standard(**rope("linear", 100000.0, factor=4.0)), "Llama"),
    Case(
        "llama-yarn",
        "LlamaConfig",
        standard(max_position_embeddings=256, **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
        "Llama",
    ),
    Case(
        "llama-yarn-attention-factor",
        "LlamaConfig",
        standard(
            max_position_embeddings=256,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.9),
        ),
        "Llama",
    ),
    Case("mistral", "MistralConfig", standard(sliding_window=None), "Mistral"),
    Case("mistral-window", "MistralConfig", standard(sliding_window=128), "Mistral", warns="last 128 tokens"),
    Case("qwen2", "Qwen2Config", standard(), "Qwen2"),
    Case("qwen2-tied-old-config", "Qwen2Config", standard(tie_word_embeddings=True), "Qwen2", edit=old_rope),
    Case("qwen3", "Qwen3Config", standard(head_dim=128), "Qwen3"),
    Case("qwen3-tied", "Qwen3Config", standard(head_dim=64, tie_word_embeddings=True), "Qwen3"),
    Case(
        "qwen3-moe",
        "Qwen3MoeConfig",
        standard(head_dim=64, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True),
        "Qwen3Moe",
    ),
    Case("gemma", "GemmaConfig", standard(head_dim=64), "Gemma", GELU_TOLERANCE),
    Case("gemma2", "Gemma2Config", gemma(sliding_window=8), "Gemma2", GELU_TOLERANCE),
    Case(
        "gemma2-mixed-windows",
        "Gemma2Config",
        gemma(sliding_window=8, num_hidden_layers=4, layer_types=MIXED_WINDOWS),
        "Gemma2",
        GELU_TOLERANCE,
    ),
    Case(
        "gemma3",
        "Gemma3TextConfig",
        gemma(sliding_window=8, num_hidden_layers=7, **GEMMA3_ROPE),
        "Gemma3",
        GELU_TOLERANCE,
        model="Gemma3ForCausalLM",
    ),
    Case(
        "gemma3-old-config",
        "Gemma3TextConfig",
        gemma(sliding_window=8, num_hidden_layers=3, sliding_window_pattern=2, **GEMMA3_ROPE),
        "Gemma3",
        GELU_TOLERANCE,
        model="Gemma3ForCausalLM",
        edit=old_gemma3_rope,
    ),
    Case(
        "phi",
        "PhiConfig",
        standard(num_key_value_heads=4, **rope(partial_rotary_factor=0.5)),
        "Phi",
        GELU_TOLERANCE,
    ),
    Case("phi-gqa", "PhiConfig", standard(**rope(partial_rotary_factor=0.25)), "Phi", GELU_TOLERANCE),
    Case("phi3", "Phi3Config", standard(original_max_position_embeddings=512), "Phi3"),
    Case(
        "phi3-window",
        "Phi3Config",
        standard(original_max_position_embeddings=512, sliding_window=128),
        "Phi3",
        warns="last 128 tokens",
    ),
    Case(
        "phi3-longrope",
        "Phi3Config",
        # llama.cpp's context in these tests is 512, so a pre-training length of 1024 means the short factors.
        standard(max_position_embeddings=4096, original_max_position_embeddings=1024, **LONGROPE),
        "Phi3",
        warns="long RoPE factors",
    ),
    Case(
        "phi3-longrope-long",
        "Phi3Config",
        # Context and prompts are longer than the pre-training length of 16: the long factors, on both sides.
        standard(max_position_embeddings=4096, original_max_position_embeddings=16, **LONGROPE),
        "Phi3",
        warns="long RoPE factors",
    ),
    Case(
        "phi4-tied-partial",
        "Phi3Config",
        standard(
            original_max_position_embeddings=512,
            tie_word_embeddings=True,
            **rope(partial_rotary_factor=0.75),
        ),
        "Phi3",
    ),
    Case("starcoder", "GPTBigCodeConfig", GPT2_STYLE, "GPTBigCode", GELU_TOLERANCE, seed=1),
    Case(
        "starcoder-all-heads",
        "GPTBigCodeConfig",
        {**GPT2_STYLE, "multi_query": False, "n_inner": 512, "tie_word_embeddings": False},
        "GPTBigCode",
        GELU_TOLERANCE,
    ),
    Case("starcoder2", "Starcoder2Config", standard(), "Starcoder2", GELU_TOLERANCE),
    Case(
        "starcoder2-window",
        "Starcoder2Config",
        standard(sliding_window=128, tie_word_embeddings=False),
        "Starcoder2",
        GELU_TOLERANCE,
        warns="last 128 tokens",
    ),
    Case("smollm3", "SmolLM3Config", standard(num_hidden_layers=5), "SmolLM3"),
    Case("gpt2", "GPT2Config", GPT2_STYLE, "GPT2", GELU_TOLERANCE, model="GPT2LMHeadModel"),
    Case(
        "gpt2-untied-wide",
        "GPT2Config",
        {**GPT2_STYLE, "n_inner": 512, "tie_word_embeddings": False},
        "GPT2",
        GELU_TOLERANCE,
        model="GPT2LMHeadModel",
    ),
)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter, norms and biases included, values that would show in the logits if misplaced."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                constant = 0.0 if name.endswith(".bias") or "gemma" in type(model).__name__.lower() else 1.0
                parameter.copy_(constant + 0.2 * noise)
            else:
                parameter.copy_(noise * (1.2 / parameter.shape[-1] ** 0.5))


def make_model(case: Case, *, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of the case, in evaluation mode."""
    config = getattr(transformers, case.config)(**case.options)
    model = case.model_class(config)
    randomise(model, case.seed)
    return model.to(dtype).eval()


def save_model(case: Case, model: Any, folder: Path) -> None:
    """Saves as save_pretrained does, then applies the case's edit of config.json."""
    model.save_pretrained(folder)
    if case.edit:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        case.edit(config)
        path.write_text(json.dumps(config))


def reference_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """transformers' logits: float32 [tokens, vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.float().numpy()


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute logit."""
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
