"""Gemma, Gemma 2 and Gemma 3.

What they share: RMSNorm multiplies by 1 + weight (llama.cpp gets the sum), the embedding is scaled by
sqrt(hidden) in the graph and is also the output matrix. Gemma 2 adds norms after each block half, soft caps
on attention scores and logits, and alternating sliding windows; Gemma 3 drops the caps, normalises each head,
and uses a second RoPE base in its windowed layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import gguf

from convert.hf.families.decoder import LlamaLike
from convert.hf.families.family import WAYS_OUT
from convert.hf.families.part import Part, Setting, count, norm, number
from convert.hf.jsonfile import Section
from convert.hf.rope import RopeKind
from convert.hf.transforms import AddOne, Transform
from quant_grids.errors import FormatError, UnsupportedError

_TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new"})


class Gemma(LlamaLike):
    """The first Gemma, and CodeGemma."""

    title = "Gemma"
    architectures = ("GemmaForCausalLM",)
    target = gguf.MODEL_ARCH.GEMMA
    # Early configurations say "gelu" for what the models compute as its tanh approximation.
    activations = _TANH_GELU | {"gelu"}
    tied_by_default = True

    def check(self) -> None:
        """Refuses a separate output matrix and attention in both directions."""
        super().check()
        self.require("tie_word_embeddings", True, default=True)
        if self.config.values.get("use_bidirectional_attention"):
            raise UnsupportedError(f"This Gemma attends in both directions, which is not a text generator; {WAYS_OUT}.")

    def norm_transform(self) -> Transform:
        """The stored weight is the multiplier less one."""
        return AddOne()


class Gemma2(Gemma):
    """Gemma 2."""

    title = "Gemma 2"
    architectures = ("Gemma2ForCausalLM",)
    target = gguf.MODEL_ARCH.GEMMA2
    activations = _TANH_GELU
    window_period = 2
    odd_depth = 46

    def check(self) -> None:
        """Refuses an attention scale other than the one llama.cpp derives."""
        super().check()
        g = self.geometry
        # llama.cpp knows the 27B models by their depth and scales their scores by hidden / heads instead.
        derived = g.hidden // g.heads if g.layers == self.odd_depth else g.head_dim
        self.require("query_pre_attn_scalar", derived, default=256)
        self.layer_windows()

    def layer_windows(self) -> list[bool]:
        """For each layer, whether its attention is limited to the window."""
        layers = self.geometry.layers
        kinds = self.config.values.get("layer_types")
        if kinds is None:
            period = self.config.integer("sliding_window_pattern", "_sliding_window_pattern", default=self.window_period)
            return [bool((layer + 1) % period) for layer in range(layers)]
        known = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            raise FormatError(f"{self.config.origin}: layer_types must name {layers} layers as one of {known}.")
        return [kind == "sliding_attention" for kind in kinds]

    def block(self, prefix: str) -> Iterator[Part]:
        """A norm before and after attention, and before and after the feed-forward block."""
        hidden, shifted = self.geometry.hidden, self.norm_transform()
        yield from norm(f"{prefix}input_layernorm", hidden, transform=shifted)
        yield from self.attention(f"{prefix}self_attn.")
        yield from norm(f"{prefix}post_attention_layernorm", hidden, transform=shifted)
        yield from norm(f"{prefix}pre_feedforward_layernorm", hidden, transform=shifted)
        yield from self.feed_forward(f"{prefix}mlp.")
        yield from norm(f"{prefix}post_feedforward_layernorm", hidden, transform=shifted)

    def window_settings(self) -> Iterator[Setting]:
        """The window, and which layers have it when that is not llama.cpp's usual alternation."""
        windows = self.layer_windows()
        if not any(windows):
            return
        yield count("attention.sliding_window", self.config.integer("sliding_window"))
        usual = [bool((layer + 1) % self.window_period) for layer in range(len(windows))]
        if windows != usual:
            yield Setting("attention.sliding_window_pattern", windows, gguf.GGUFValueType.ARRAY)

    def settings(self) -> Iterator[Setting]:
        """Adds the caps and the window."""
        yield from super().settings()
        yield number("attn_logit_softcapping", self.config.real("attn_logit_softcapping"))
        yield number("final_logit_softcapping", self.config.real("final_logit_softcapping"))
        if not any(self.layer_windows()):
            raise UnsupportedError(f"llama.cpp's gemma2 graph always has windowed layers, this model none; {WAYS_OUT}.")
        yield from self.window_settings()


class Gemma3(Gemma2):
    """Gemma 3, the text models (270M, 1B)."""

    title = "Gemma 3 (text)"
    architectures = ("Gemma3ForCausalLM",)
    target = gguf.MODEL_ARCH.GEMMA3
    window_period = 6
    odd_depth = 62
    head_norms = True
    rope_layers = "full_attention"
    default_theta = 1_000_000.0
    rope_kinds = frozenset({RopeKind.DEFAULT, RopeKind.LINEAR})

    def check(self) -> None:
        """Refuses a cap on attention scores, which Gemma 3 no longer has."""
        super().check()
        self.require("attn_logit_softcapping", None, default=None)

    def settings(self) -> Iterator[Setting]:
        """RoPE for both kinds of layers, and the window."""
        g = self.geometry
        yield from self.common_settings()
        yield count("attention.key_length", g.head_dim)
        yield count("attention.value_length", g.head_dim)
        yield number("attention.layer_norm_rms_epsilon", self.config.real("rms_norm_eps", default=1e-6))
        yield from self.rope_settings()
        if any(self.layer_windows()):
            yield number("rope.freq_base_swa", self._windowed_theta())
        if self.config.has("final_logit_softcapping"):
            yield number("final_logit_softcapping", self.config.real("final_logit_softcapping"))
        yield from self.window_settings()

    def _windowed_theta(self) -> float:
        """RoPE base of the windowed layers, which llama.cpp never stretches."""
        parameters = self.config.section("rope_parameters")
        if parameters.has("sliding_attention"):
            rope = self.rope("sliding_attention")
            if rope.kind is not RopeKind.DEFAULT:
                raise UnsupportedError(f"llama.cpp does not stretch RoPE in windowed layers, this model does; {WAYS_OUT}.")
            return rope.theta
        return self.config.real("rope_local_base_freq", default=10000.0)


class Gemma3Multimodal(Gemma3):
    """The text half of Gemma 3's image-and-text models (4B, 12B, 27B).

    Their configuration nests the text model's, and leaves out what equals transformers' defaults.
    """

    title = "Gemma 3 (text half of the multimodal models)"
    architectures = ("Gemma3ForConditionalGeneration",)
    text_prefixes = ("language_model.", "model.language_model.")
    defaults = {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    }

    def __init__(self, config: Section) -> None:
        text = config.section("text_config")
        super().__init__(Section({**self.defaults, **text.values}, text.origin))
        self.warnings.append("Only the text half is converted; the image encoder is left out.")

    def canonical_names(self, names: Collection[str]) -> dict[str, str]:
        """Drops the image encoder and unwraps the text model."""
        chosen: dict[str, str] = {}
        for name in names:
            for prefix in self.text_prefixes:
                inner = name.removeprefix(prefix)
                if inner != name:
                    chosen[inner if inner.startswith(("model.", "lm_head.")) else f"model.{inner}"] = name
            if name == "lm_head.weight":
                chosen[name] = name
        return chosen
