"""GPT-2 and the code models that grew out of it: GPTBigCode (StarCoder, SantaCoder) and StarCoder2.

GPT-2's layers are "Conv1D" modules, whose weights are stored the other way round. GPTBigCode uses ordinary
linear layers and one key/value head shared by all query heads. StarCoder2 replaces learned positions by RoPE
and otherwise keeps LayerNorm and a plain two-matrix feed-forward block.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from convert.hf.families.decoder import LlamaLike
from convert.hf.families.family import MAX_LAYERS, WAYS_OUT, Family, Geometry
from convert.hf.families.part import Part, Setting, linear, norm, number
from convert.hf.transforms import SAME, HeadsTogether, Transform, Transpose
from quant_grids.errors import FormatError, UnsupportedError

_TANH_GELU = frozenset({"gelu_new", "gelu_pytorch_tanh", "gelu_fast"})


class GPT2(Family):
    """GPT-2 of every size."""

    title = "GPT-2"
    architectures = ("GPT2LMHeadModel",)
    target = gguf.MODEL_ARCH.GPT2
    base_prefix = "transformer."
    activations = _TANH_GELU
    tied_by_default = True
    # Causal masks and their fill value, stored as buffers by old versions.
    ignored = (".attn.bias", ".attn.masked_bias")

    def default_activation(self) -> str:
        """GPT-2's own default."""
        return "gelu_new"

    def read_geometry(self) -> Geometry:
        """Widths under GPT-2's names."""
        c = self.config
        hidden, heads = c.integer("n_embd", "hidden_size"), c.integer("n_head", "num_attention_heads")
        if hidden % heads:
            raise FormatError(f"{c.origin}: n_embd {hidden} is not a multiple of n_head {heads}.")
        return Geometry(
            hidden=hidden,
            layers=c.integer("n_layer", "num_hidden_layers", high=MAX_LAYERS),
            heads=heads,
            kv_heads=self.kv_heads(heads),
            head_dim=hidden // heads,
            feed_forward=c.integer("n_inner", default=4 * hidden),
            vocabulary=c.integer("vocab_size"),
            context=c.integer("n_positions", "n_ctx", default=1024),
        )

    def kv_heads(self, heads: int) -> int:
        """Key/value heads: as many as attention heads."""
        return heads

    def check(self) -> None:
        """Refuses scaling rules that llama.cpp's graph does not have."""
        super().check()
        self.require("scale_attn_weights", True, default=True)
        self.require("scale_attn_by_inverse_layer_idx", False, default=False)
        self.require("add_cross_attention", False, default=False)

    def matrix(self, module: str, rows: int, columns: int, transform: Transform = SAME) -> Iterator[Part]:
        """A layer of `rows` outputs, stored `[in, out]` as Conv1D does."""
        yield Part((f"{module}.weight",), (columns, rows), Transpose())
        yield Part((f"{module}.bias",), (rows,))

    def qkv_transform(self) -> Transform:
        """Row order of the joint q, k, v matrix."""
        return SAME

    def parts(self) -> Iterator[Part]:
        """Embeddings of tokens and positions, blocks, final norm, and the head unless it is the embedding."""
        g = self.geometry
        yield from linear("transformer.wte", g.vocabulary, g.hidden)
        yield from linear("transformer.wpe", g.context, g.hidden)
        for layer in range(g.layers):
            prefix = f"transformer.h.{layer}."
            yield from norm(f"{prefix}ln_1", g.hidden, bias=True)
            rows = g.q_rows + 2 * g.kv_rows
            yield from self.matrix(f"{prefix}attn.c_attn", rows, g.hidden, self.qkv_transform())
            yield from self.matrix(f"{prefix}attn.c_proj", g.hidden, g.q_rows)
            yield from norm(f"{prefix}ln_2", g.hidden, bias=True)
            yield from self.matrix(f"{prefix}mlp.c_fc", g.feed_forward, g.hidden)
            yield from self.matrix(f"{prefix}mlp.c_proj", g.hidden, g.feed_forward)
        yield from norm("transformer.ln_f", g.hidden, bias=True)
        if not self.tied:
            yield from linear("lm_head", g.vocabulary, g.hidden)

    def settings(self) -> Iterator[Setting]:
        """Widths and LayerNorm epsilon."""
        yield from self.common_settings()
        yield number("attention.layer_norm_epsilon", self.config.real("layer_norm_epsilon", default=1e-5))


class GPTBigCode(GPT2):
    """GPTBigCode: StarCoder, StarCoderBase (1B to 15B), SantaCoder."""

    title = "GPTBigCode (StarCoder, StarCoderBase-1B)"
    architectures = ("GPTBigCodeForCausalLM",)
    target = gguf.MODEL_ARCH.STARCODER

    def kv_heads(self, heads: int) -> int:
        """One for multi-query attention."""
        return 1 if self.config.flag("multi_query", True) else heads

    def qkv_transform(self) -> Transform:
        """Without multi-query attention, q, k and v are interleaved head by head."""
        return SAME if self.config.flag("multi_query", True) else HeadsTogether(self.geometry.heads)

    def matrix(self, module: str, rows: int, columns: int, transform: Transform = SAME) -> Iterator[Part]:
        """An ordinary linear layer."""
        yield from linear(module, rows, columns, bias=True, transform=transform)


class Starcoder2(LlamaLike):
    """StarCoder2: RoPE, grouped key/value heads, LayerNorm, a feed-forward block of two matrices."""

    title = "StarCoder2"
    architectures = ("Starcoder2ForCausalLM",)
    target = gguf.MODEL_ARCH.STARCODER2
    activations = _TANH_GELU
    tied_by_default = True

    def default_activation(self) -> str:
        """StarCoder2's own default."""
        return "gelu_pytorch_tanh"

    def check(self) -> None:
        """Refuses layers without biases; notes the sliding window."""
        super().check()
        self.require("use_bias", True, default=True)
        if self.geometry.q_rows != self.geometry.hidden:
            raise UnsupportedError(f"llama.cpp's starcoder2 graph needs heads * head_dim = hidden_size; {WAYS_OUT}.")
        if self.config.has("sliding_window"):
            self.note_window(self.config.integer("sliding_window"))

    def parts(self) -> Iterator[Part]:
        """As for Llama, with biases everywhere but the head."""
        g = self.geometry
        yield from linear("model.embed_tokens", g.vocabulary, g.hidden)
        for layer in range(g.layers):
            prefix = f"model.layers.{layer}."
            yield from norm(f"{prefix}input_layernorm", g.hidden, bias=True)
            for name, rows in (("q", g.q_rows), ("k", g.kv_rows), ("v", g.kv_rows)):
                yield from linear(f"{prefix}self_attn.{name}_proj", rows, g.hidden, bias=True)
            yield from linear(f"{prefix}self_attn.o_proj", g.hidden, g.q_rows, bias=True)
            yield from norm(f"{prefix}post_attention_layernorm", g.hidden, bias=True)
            yield from linear(f"{prefix}mlp.c_fc", g.feed_forward, g.hidden, bias=True)
            yield from linear(f"{prefix}mlp.c_proj", g.hidden, g.feed_forward, bias=True)
        yield from norm("model.norm", g.hidden, bias=True)
        if not self.tied:
            yield from linear("lm_head", g.vocabulary, g.hidden)

    def settings(self) -> Iterator[Setting]:
        """Widths, LayerNorm epsilon, RoPE."""
        yield from self.common_settings()
        yield number("attention.layer_norm_epsilon", self.config.real("norm_epsilon", default=1e-5))
        yield from self.rope_settings()
