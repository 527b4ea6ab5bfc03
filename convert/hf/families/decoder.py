"""Families whose blocks have Llama's shape: norm, attention, norm, gated feed-forward.

Llama set the pattern and most later models vary it in a few switches, so they are switches here: a norm on
each query and key head (Qwen3), biases on q, k and v (Qwen2), no row reordering where llama.cpp's graph uses
transformers' own RoPE layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import gguf

from convert.hf.families.family import WAYS_OUT, Family
from convert.hf.families.part import Part, Setting, count, linear, norm, number
from convert.hf.rope import RopeKind
from convert.hf.transforms import RopePairs, Same, Transform
from quant_grids.errors import UnsupportedError


class LlamaLike(Family):
    """A decoder with Llama's blocks.

    Class attributes:
        pairs_rows: llama.cpp's graph rotates neighbouring rows, so q and k are reordered.
        qkv_bias: q, k and v have biases whatever the configuration says.
        head_norms: Each query and key head is normalised.
        extra_biases: llama.cpp's graph adds the biases that `attention_bias` and `mlp_bias` ask for.
    """

    pairs_rows: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False
    head_norms: ClassVar[bool] = False
    extra_biases: ClassVar[bool] = False

    def check(self) -> None:
        """Refuses biases that llama.cpp's graph would not add."""
        super().check()
        if not self.extra_biases:
            self.require("attention_bias", False, default=False)
            self.require("mlp_bias", False, default=False)

    def note_switched_window(self) -> None:
        """Notes a sliding window that is there and switched on."""
        if self.config.flag("use_sliding_window", False) and self.config.has("sliding_window"):
            self.note_window(self.config.integer("sliding_window"))

    def parts(self) -> Iterator[Part]:
        """Embedding, blocks, final norm, and the head unless it is the embedding."""
        g = self.geometry
        yield from linear("model.embed_tokens", g.vocabulary, g.hidden)
        for layer in range(g.layers):
            yield from self.block(f"model.layers.{layer}.")
        yield from norm("model.norm", g.hidden, transform=self.norm_transform())
        if not self.tied:
            yield from linear("lm_head", g.vocabulary, g.hidden)
        yield from self.rope_parts()

    def norm_transform(self) -> Transform:
        """How norm weights are stored."""
        return Same()

    def block(self, prefix: str) -> Iterator[Part]:
        """One block's tensors; `prefix` ends with a dot."""
        g = self.geometry
        yield from norm(f"{prefix}input_layernorm", g.hidden, transform=self.norm_transform())
        yield from self.attention(f"{prefix}self_attn.")
        yield from norm(f"{prefix}post_attention_layernorm", g.hidden, transform=self.norm_transform())
        yield from self.feed_forward(f"{prefix}mlp.")

    def attention(self, prefix: str) -> Iterator[Part]:
        """q, k, v, o and the head norms."""
        g = self.geometry
        attention_bias = self.config.flag("attention_bias", False)
        bias = self.qkv_bias or attention_bias
        q_rows: Transform = RopePairs(g.heads) if self.pairs_rows else Same()
        k_rows: Transform = RopePairs(g.kv_heads) if self.pairs_rows else Same()
        yield from linear(f"{prefix}q_proj", g.q_rows, g.hidden, bias=bias, transform=q_rows)
        yield from linear(f"{prefix}k_proj", g.kv_rows, g.hidden, bias=bias, transform=k_rows)
        yield from linear(f"{prefix}v_proj", g.kv_rows, g.hidden, bias=bias)
        yield from linear(f"{prefix}o_proj", g.hidden, g.q_rows, bias=attention_bias)
        if self.head_norms:
            yield from norm(f"{prefix}q_norm", g.head_dim, transform=self.norm_transform())
            yield from norm(f"{prefix}k_norm", g.head_dim, transform=self.norm_transform())

    def feed_forward(self, prefix: str) -> Iterator[Part]:
        """gate, up and down."""
        g = self.geometry
        bias = self.config.flag("mlp_bias", False)
        yield from linear(f"{prefix}gate_proj", g.feed_forward, g.hidden, bias=bias)
        yield from linear(f"{prefix}up_proj", g.feed_forward, g.hidden, bias=bias)
        yield from linear(f"{prefix}down_proj", g.hidden, g.feed_forward, bias=bias)

    def settings(self) -> Iterator[Setting]:
        """Widths, head size, norm epsilon and RoPE."""
        g = self.geometry
        yield from self.common_settings()
        yield count("attention.key_length", g.head_dim)
        yield count("attention.value_length", g.head_dim)
        yield number("attention.layer_norm_rms_epsilon", self.config.real("rms_norm_eps", default=1e-6))
        yield from self.rope_settings()


class Llama(LlamaLike):
    """Llama 1, 2, 3; DeepSeek-Coder, SmolLM and SmolLM2, which use its architecture unchanged."""

    title = "Llama 1/2/3, DeepSeek-Coder, SmolLM, SmolLM2 and others of the Llama architecture"
    architectures = ("LlamaForCausalLM",)
    target = gguf.MODEL_ARCH.LLAMA
    pairs_rows = True
    extra_biases = True
    rope_kinds = frozenset(RopeKind)


class Mistral(Llama):
    """Mistral 7B and its kin: Llama's blocks, in the early ones with a sliding window."""

    title = "Mistral"
    architectures = ("MistralForCausalLM",)

    def check(self) -> None:
        """Notes the sliding window, which llama.cpp's llama graph does not have."""
        super().check()
        if self.config.has("sliding_window"):
            self.note_window(self.config.integer("sliding_window"))


class Qwen2(LlamaLike):
    """Qwen2, Qwen2.5 and Qwen2.5-Coder: biases on q, k, v; RoPE in transformers' own layout."""

    title = "Qwen2, Qwen2.5, Qwen2.5-Coder"
    architectures = ("Qwen2ForCausalLM",)
    target = gguf.MODEL_ARCH.QWEN2
    qkv_bias = True

    def check(self) -> None:
        """Notes a sliding window that is switched on (in the published models it is off)."""
        super().check()
        self.note_switched_window()
        if self.geometry.q_rows != self.geometry.hidden:
            raise UnsupportedError(f"llama.cpp's qwen2 graph needs heads * head_dim = hidden_size; {WAYS_OUT}.")


class Qwen3(LlamaLike):
    """Dense Qwen3: a norm on each query and key head, and a head size of its own."""

    title = "Qwen3 (dense)"
    architectures = ("Qwen3ForCausalLM",)
    target = gguf.MODEL_ARCH.QWEN3
    head_norms = True

    def check(self) -> None:
        """Notes a sliding window that is switched on."""
        super().check()
        self.note_switched_window()


class SmolLM3(LlamaLike):
    """SmolLM3: Llama's blocks, every fourth of them without RoPE."""

    title = "SmolLM3"
    architectures = ("SmolLM3ForCausalLM",)
    target = gguf.MODEL_ARCH.SMOLLM3
    pairs_rows = True
    tied_by_default = True
    default_theta = 2_000_000.0

    def check(self) -> None:
        """Refuses another choice of layers without RoPE than llama.cpp's fixed one."""
        super().check()
        self.note_switched_window()
        step = self.config.integer("no_rope_layer_interval", default=4)
        usual = [int((layer + 1) % 4 != 0) for layer in range(self.geometry.layers)]
        chosen = [int((layer + 1) % step != 0) for layer in range(self.geometry.layers)]
        if self.config.values.get("no_rope_layers", chosen) != usual:
            raise UnsupportedError(
                f"llama.cpp's smollm3 graph leaves RoPE out of every fourth layer, this model of others; {WAYS_OUT}."
            )
