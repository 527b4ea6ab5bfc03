"""Microsoft's Phi models: phi-1, 1.5 and 2 (`phi2` in llama.cpp), and Phi-3, 3.5 and 4 (`phi3`)."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from convert.hf.families.decoder import LlamaLike
from convert.hf.families.family import WAYS_OUT, Family
from convert.hf.families.part import Part, Setting, count, linear, norm, number
from convert.hf.rope import RopeKind
from quant_grids.errors import FormatError, UnsupportedError


def _rotated(family: Family, usual_share: float) -> int:
    """How many dimensions of a head RoPE turns, for models that leave the rest alone.

    Args:
        family: The model.
        usual_share: The share of a head that is turned when the configuration does not say.

    Raises:
        FormatError: The share is not in 0..1, or leaves an odd number.
    """
    config, key = family.config, "partial_rotary_factor"
    share = config.section("rope_parameters").real(key, default=config.real(key, default=usual_share))
    rotated = int(share * family.geometry.head_dim)
    if not 0 < share <= 1 or rotated % 2 or rotated == 0:
        raise FormatError(f"{config.origin}: {key} {share} does not fit heads of {family.geometry.head_dim}.")
    return rotated


class Phi(Family):
    """phi-1, phi-1.5, phi-2: attention and feed-forward side by side after one LayerNorm, biases everywhere."""

    title = "Phi (phi-1, phi-1.5, phi-2)"
    architectures = ("PhiForCausalLM",)
    target = gguf.MODEL_ARCH.PHI2
    activations = frozenset({"gelu_new", "gelu_pytorch_tanh", "gelu_fast"})

    @property
    def rotated(self) -> int:
        """Half of each head, unless the configuration says otherwise."""
        return _rotated(self, 0.5)

    def default_activation(self) -> str:
        """Phi's own default."""
        return "gelu_new"

    def check(self) -> None:
        """Refuses norms on the heads and shared embeddings, which llama.cpp's graph does not have."""
        super().check()
        self.require("qk_layernorm", False, default=False)
        self.require("tie_word_embeddings", False, default=False)

    def parts(self) -> Iterator[Part]:
        """Embedding, blocks, final norm and head."""
        g = self.geometry
        yield from linear("model.embed_tokens", g.vocabulary, g.hidden)
        for layer in range(g.layers):
            prefix = f"model.layers.{layer}."
            yield from norm(f"{prefix}input_layernorm", g.hidden, bias=True)
            yield from linear(f"{prefix}self_attn.q_proj", g.q_rows, g.hidden, bias=True)
            yield from linear(f"{prefix}self_attn.k_proj", g.kv_rows, g.hidden, bias=True)
            yield from linear(f"{prefix}self_attn.v_proj", g.kv_rows, g.hidden, bias=True)
            yield from linear(f"{prefix}self_attn.dense", g.hidden, g.q_rows, bias=True)
            yield from linear(f"{prefix}mlp.fc1", g.feed_forward, g.hidden, bias=True)
            yield from linear(f"{prefix}mlp.fc2", g.hidden, g.feed_forward, bias=True)
        yield from norm("model.final_layernorm", g.hidden, bias=True)
        yield from linear("lm_head", g.vocabulary, g.hidden, bias=True)

    def settings(self) -> Iterator[Setting]:
        """Widths, LayerNorm epsilon, RoPE over a part of each head."""
        yield from self.common_settings()
        yield number("attention.layer_norm_epsilon", self.config.real("layer_norm_eps", default=1e-5))
        yield from self.rope_settings()


class Phi3(LlamaLike):
    """Phi-3, Phi-3.5, Phi-4: Llama's blocks with q, k, v in one matrix and gate and up in another."""

    title = "Phi-3, Phi-3.5, Phi-4 (dense, text)"
    architectures = ("Phi3ForCausalLM",)
    target = gguf.MODEL_ARCH.PHI3
    rope_kinds = frozenset({RopeKind.DEFAULT, RopeKind.LONGROPE})

    @property
    def rotated(self) -> int:
        """All of each head, unless the configuration says otherwise (Phi-4-mini: three quarters)."""
        return _rotated(self, 1.0)

    def check(self) -> None:
        """Notes what llama.cpp does differently on long prompts."""
        super().check()
        if self.geometry.q_rows != self.geometry.hidden:
            raise UnsupportedError(f"llama.cpp's phi3 graph needs heads * head_dim = hidden_size; {WAYS_OUT}.")
        if self.config.has("sliding_window"):
            self.note_window(self.config.integer("sliding_window"))
        rope = self.rope()
        if rope.kind is RopeKind.LONGROPE:
            self.warnings.append(
                "llama.cpp picks the long RoPE factors when its context is larger than "
                f"{rope.original_context(self.geometry.context)} tokens, transformers when the prompt is."
            )

    def attention(self, prefix: str) -> Iterator[Part]:
        """q, k and v in one matrix, as llama.cpp wants them for this architecture."""
        g = self.geometry
        yield from linear(f"{prefix}qkv_proj", g.q_rows + 2 * g.kv_rows, g.hidden)
        yield from linear(f"{prefix}o_proj", g.hidden, g.q_rows)

    def feed_forward(self, prefix: str) -> Iterator[Part]:
        """Gate and up in one matrix, and down."""
        g = self.geometry
        yield from linear(f"{prefix}gate_up_proj", 2 * g.feed_forward, g.hidden)
        yield from linear(f"{prefix}down_proj", g.hidden, g.feed_forward)

    def settings(self) -> Iterator[Setting]:
        """Widths, norm epsilon, RoPE over the rotated part of each head."""
        yield from self.common_settings()
        yield number("attention.layer_norm_rms_epsilon", self.config.real("rms_norm_eps", default=1e-5))
        yield from self.rope_settings()
        # Zero tells Phi-4 from the others; llama.cpp then knows that there is no window.
        window = self.config.integer("sliding_window") if self.config.has("sliding_window") else 0
        yield count("attention.sliding_window", window)
