"""Tiny random models of the families that people ship, made with transformers' own configuration classes.

Each is as small as llama.cpp's k-quants allow (rows of 256 weights) and has what makes its family its own: experts, windows,
recurrent layers, latent attention. The vocabulary is that of the tokenizer that goes with them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers.hf_sentencepiece import to_json, train_sentencepiece
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

LAYERS = 4
VOCABULARY = 384
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]}}


@dataclass(frozen=True)
class Toy:
    """A model to make.

    Attributes:
        family: name for people.
        config: transformers' configuration class.
        options: its arguments beside the common ones.
        model: class of the model, if not the configuration's obvious one.
        text: where the configuration has halves, the name of the language half.
        published: what config.json of published models has, and what this transformers saves leaves out.
        input_first: a part of the names of tensors that published models store with their last two dimensions changed over.
        special: tokens that the converter looks for.
        sentencepiece: the tokenizer is a SentencePiece one: "model" for tokenizer.model, "json" for a tokenizer.json made of it.
    """

    family: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    text: str = ""
    published: dict[str, Any] = field(default_factory=dict)
    input_first: str = ""
    special: tuple[str, ...] = ()
    sentencepiece: str = ""

    @property
    def architecture(self) -> str:
        """The name in config.json's `architectures`."""
        return self.model or self.config.removesuffix("TextConfig").removesuffix("Config") + "ForCausalLM"


def common(vocabulary: int) -> dict[str, Any]:
    """What nearly every configuration takes."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
GLM_TOKENS = ("<|endoftext|>", "<|user|>", "[gMASK]", "<|observation|>")
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "head_dim": 64,
}
MIXED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
WINDOWS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
LATENT = {
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
}
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
}

TOYS: tuple[Toy, ...] = (
    Toy("Qwen3.5 (dense)", "Qwen3_5TextConfig", {**LINEAR, "layer_types": MIXED}, "Qwen3_5ForCausalLM"),
    Toy(
        "Qwen3.5-MoE",
        "Qwen3_5MoeTextConfig",
        # transformers' tokenizer for it adds tokens of its own behind the last one.
        {**LINEAR, **EXPERTS, "layer_types": MIXED, "shared_expert_intermediate_size": 256, "vocab_size": 512},
        "Qwen3_5MoeForCausalLM",
    ),
    Toy(
        "Qwen3-Next", "Qwen3NextConfig", {**LINEAR, **EXPERTS, "layer_types": MIXED, "shared_expert_intermediate_size": 256}
    ),
    Toy("Qwen3-VL (text)", "Qwen3VLConfig", {"head_dim": 64, **SECTIONS}, "Qwen3VLForConditionalGeneration", "text_config"),
    Toy(
        "Qwen3-VL-MoE (text)",
        "Qwen3VLMoeConfig",
        {**EXPERTS, "head_dim": 64, **SECTIONS},
        "Qwen3VLMoeForConditionalGeneration",
        "text_config",
        input_first=".experts.",
    ),
    Toy(
        "Gemma 3n",
        "Gemma3nTextConfig",
        {
            "head_dim": 64,
            "hidden_size_per_layer_input": 256,
            "laurel_rank": 64,
            "layer_types": WINDOWS,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.95] * LAYERS,  # llama.cpp has this share built in, for the first ten layers
            "tie_word_embeddings": True,
        },
        "Gemma3nForCausalLM",
    ),
    Toy(
        "Gemma 4",
        "Gemma4TextConfig",
        {
            "head_dim": 64,
            "global_head_dim": 128,
            "final_logit_softcapping": 30.0,  # as published; llama.cpp takes it for granted
            "vocab_size": 600,
            "hidden_size_per_layer_input": 256,
            "layer_types": WINDOWS,
            "num_kv_shared_layers": 0,
            "tie_word_embeddings": True,
        },
        "Gemma4ForCausalLM",
        published={"global_head_dim": 128},
        sentencepiece="json",
    ),
    Toy(
        "gpt-oss",
        "GptOssConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64, "intermediate_size": 256},
    ),
    Toy("GLM-4", "Glm4Config", {"head_dim": 64}, special=GLM_TOKENS),
    Toy(
        "GLM-4.5 (MoE)",
        "Glm4MoeConfig",
        {**DEEPSEEK_EXPERTS, "head_dim": 64, "use_qk_norm": True},
        published={"num_nextn_predict_layers": 0},
        special=GLM_TOKENS,
    ),
    Toy(
        "GLM-5",
        "GlmMoeDsaConfig",
        {**DEEPSEEK_EXPERTS, **LATENT, "index_topk": 64, "index_head_dim": 128, "index_n_heads": 4},
        special=GLM_TOKENS,
    ),
    Toy("DeepSeek V2", "DeepseekV2Config", {**DEEPSEEK_EXPERTS, **LATENT}),
    Toy("DeepSeek V3", "DeepseekV3Config", {**DEEPSEEK_EXPERTS, **LATENT}, published={"scoring_func": "sigmoid"}),
    Toy(
        "Llama 4",
        "Llama4TextConfig",
        {"num_local_experts": 8, "intermediate_size": 256, "intermediate_size_mlp": 512, "head_dim": 64},
        "Llama4ForCausalLM",
    ),
    Toy("Ministral 3", "Ministral3Config", {"head_dim": 64}),
    Toy(
        "Mistral 4",
        "Mistral3Config",
        {**DEEPSEEK_EXPERTS, **LATENT, "model_type": "mistral4"},
        "Mistral3ForConditionalGeneration",
        "text_config",
    ),
    Toy("Granite", "GraniteConfig", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    Toy("Granite-MoE", "GraniteMoeConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256}),
    Toy(
        "Granite 4 (hybrid)",
        "GraniteMoeHybridConfig",
        {
            **MAMBA,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 256,
            "shared_intermediate_size": 256,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
        },
    ),
    Toy(
        "LFM2", "Lfm2Config", {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
    ),
    Toy(
        "LFM2-MoE",
        "Lfm2MoeConfig",
        {
            **EXPERTS,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    Toy("OLMo 2", "Olmo2Config"),
    Toy("OLMo 3", "Olmo3Config", {"layer_types": WINDOWS, "sliding_window": 64}),
    Toy(
        "OLMoE",
        "OlmoeConfig",
        {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256},
    ),
    Toy(
        "Nemotron-H",
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "ssm_state_size": 64,
            "n_groups": 1,
            "head_dim": 64,
        },
    ),
    Toy("Falcon-H1", "FalconH1Config", {**MAMBA, "mamba_d_ssm": 512, "head_dim": 64}),
    Toy("Kimi Linear", "KimiLinearConfig", {**DEEPSEEK_EXPERTS, **LATENT, "q_lora_rank": None}),
    Toy(
        "MiniMax M2",
        "MiniMaxM2Config",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256, "head_dim": 64},
        published={"scoring_func": "sigmoid"},
    ),
    # As the 1.2B model: llama.cpp knows the windows of the 32B one by its 64 layers.
    Toy(
        "EXAONE 4",
        "Exaone4Config",
        {"layer_types": ["full_attention"] * LAYERS, "sliding_window": None, "sliding_window_pattern": None},
    ),
    Toy(
        "Cohere 2",
        "Cohere2Config",
        {"layer_types": WINDOWS, "sliding_window": 64, "tie_word_embeddings": True},
        published={"rotary_pct": 1.0},
    ),
    Toy("Apertus", "ApertusConfig"),
    Toy("ERNIE 4.5", "Ernie4_5Config", {"head_dim": 64, "vocab_size": 600}, sentencepiece="model"),
    Toy(
        "ERNIE 4.5 (MoE)",
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 256,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "vocab_size": 600,
        },
        sentencepiece="model",
    ),
    Toy("Hunyuan (dense)", "HunYuanDenseV1Config", {"head_dim": 64}),
    Toy("Hunyuan (MoE)", "HunYuanMoEV1Config", {"num_experts": 8, "moe_topk": 2, "head_dim": 64, "intermediate_size": 256}),
    Toy("Mixtral", "MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256}),
    Toy("Qwen2-MoE", "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 256}),
    Toy("Seed-OSS", "SeedOssConfig", {"head_dim": 64}),
)


def save_toy(toy: Toy, folder: Path, vocabulary: int = VOCABULARY) -> Any:
    """The model and its tokenizer in a folder, as published models of the family look; returns the model."""
    model = make_toy(toy, vocabulary)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | toy.published))
    if toy.input_first:
        weights = load_file(folder / "model.safetensors")
        turned = {name: weights[name].transpose(1, 2).contiguous() for name in weights if toy.input_first in name}
        save_file(weights | turned, folder / "model.safetensors", metadata={"format": "pt"})
    if toy.sentencepiece == "model":
        (folder / "tokenizer.model").write_bytes(train_sentencepiece("bpe"))
    elif toy.sentencepiece == "json":
        to_json(train_sentencepiece("bpe"), folder)
    else:
        save_tokenizer(train_byte_bpe(digits_then_bytes(), vocabulary=vocabulary, special=toy.special), folder)
    return model


def make_toy(toy: Toy, vocabulary: int, seed: int = 0) -> Any:
    """The model: float32, in evaluation mode, every parameter with values that would show if misplaced."""
    options = {**common(vocabulary), **toy.options}
    if toy.config == "Gemma3nTextConfig" or toy.config == "Gemma4TextConfig":
        options["vocab_size_per_layer_input"] = options["vocab_size"]
    kind = getattr(transformers, toy.config)
    tiny_vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
        "image_size": 28,
        "patch_size": 14,
    }
    config = kind(text_config=options, vision_config=tiny_vision) if toy.text else kind(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, toy.architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "conv" not in name:
                parameter.copy_(noise * (1.2 / parameter.shape[-1] ** 0.5))
            elif name.endswith("norm.weight"):
                parameter.add_(0.1 * noise)
    return model.float().eval()
