"""Rotary position settings: what config.json says, and what llama.cpp is told.

Older checkpoints keep `rope_theta` and an optional `rope_scaling` object at the top of the configuration;
transformers 5 writes one `rope_parameters` object, and models with two kinds of layers (Gemma 3) nest one per
kind under `full_attention` and `sliding_attention`. `RopeSettings` is the same thing for both.

llama.cpp knows four ways to stretch positions. `linear` and `yarn` are metadata. `llama3` is a tensor
(`rope_freqs.weight`, a divisor for each frequency), because its band-dependent factors cannot be said in a
number. `longrope` is two such tensors, one for short and one for long contexts, and an attention factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from convert.hf.jsonfile import Section
from quant_grids.errors import FormatError, UnsupportedError


class RopeKind(StrEnum):
    """How positions are stretched beyond the pre-training context."""

    DEFAULT = "default"
    LINEAR = "linear"
    YARN = "yarn"
    LLAMA3 = "llama3"
    LONGROPE = "longrope"


_SPELLINGS = {"su": RopeKind.LONGROPE, "default": RopeKind.DEFAULT}


@dataclass(frozen=True)
class RopeSettings:
    """One kind of layers' rotary settings.

    Attributes:
        kind: The stretching.
        theta: The frequency base.
        section: The object they came from, for the kind's own parameters.
    """

    kind: RopeKind
    theta: float
    section: Section

    @property
    def factor(self) -> float:
        """By how much positions are stretched; a positive number."""
        factor = self.section.real("factor")
        if factor <= 0:
            raise FormatError(f"{self.section.origin}: factor is {factor}, it must be positive.")
        return factor

    def yarn_attention_ratio(self) -> float:
        """The configuration's YaRN attention factor, relative to the one llama.cpp computes: 0.1 ln(factor) + 1.

        The rule for a configuration that names none, or `mscale` instead, is transformers'.
        """

        def strength(scale: float) -> float:
            return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.section.has("attention_factor"):
            return self.section.real("attention_factor") / strength(1.0)
        scale, scale_all = self.section.real("mscale", default=0.0), self.section.real("mscale_all_dim", default=0.0)
        return strength(scale) / strength(scale_all) / strength(1.0) if scale and scale_all else 1.0

    def original_context(self, context: int) -> int:
        """Length the model was pre-trained with, before stretching; `context` when the file does not say."""
        return self.section.integer("original_max_position_embeddings", default=context)


def read_rope(config: Section, *, layers: str | None = None, default_theta: float = 10000.0) -> RopeSettings:
    """Reads the rotary settings of a configuration, old or new.

    Args:
        config: The model configuration.
        layers: `full_attention` or `sliding_attention` for a configuration that has one object per kind of
            layer.
        default_theta: Base when the configuration names none.

    Raises:
        FormatError: Values of the wrong type.
        UnsupportedError: A stretching llama.cpp has no counterpart for (dynamic, for one).
    """
    section = config.section("rope_parameters" if config.has("rope_parameters") else "rope_scaling")
    if layers and section.has(layers):
        section = section.section(layers)
    name = section.text("rope_type", "type", default="default").lower()
    try:
        kind = _SPELLINGS.get(name) or RopeKind(name)
    except ValueError:
        known = ", ".join(RopeKind)
        raise UnsupportedError(
            f"{config.origin} asks for RoPE scaling {name!r}; this converter knows {known}. "
            "Use llama.cpp's converter with --converter PATH, or give a ready F16/BF16 GGUF."
        ) from None
    theta = section.real("rope_theta", default=config.real("rope_theta", "rotary_emb_base", default=default_theta))
    if theta <= 0:
        raise FormatError(f"{section.origin}: rope_theta is {theta}, it must be positive.")
    if not section.has("original_max_position_embeddings") and config.has("original_max_position_embeddings"):
        original = config.integer("original_max_position_embeddings")
        section = Section({**section.values, "original_max_position_embeddings": original}, section.origin)
    return RopeSettings(kind, theta, section)


def llama3_divisors(rope: RopeSettings, dimensions: int) -> torch.Tensor:
    """The `rope_freqs.weight` tensor of Llama 3.1 scaling.

    Frequencies whose wavelength fits the original context many times stay; those longer than it are divided
    by `factor`; between the two limits the *frequency* is interpolated. llama.cpp divides each angle by the
    stored number, so what is stored is old frequency / new frequency. (The formula is Meta's; transformers'
    `modeling_rope_utils` computes the same.)

    Args:
        rope: Settings of kind `llama3`.
        dimensions: Rotated dimensions of a head.

    Returns:
        float32 [dimensions / 2].
    """
    low = rope.section.real("low_freq_factor", default=1.0)
    high = rope.section.real("high_freq_factor", default=4.0)
    if not 0 < low < high:
        raise FormatError(
            f"{rope.section.origin}: low_freq_factor {low} and high_freq_factor {high} must be 0 < low < high."
        )
    original = rope.original_context(8192)
    divisors = []
    for index in range(0, dimensions, 2):
        wavelength = 2 * math.pi * rope.theta ** (index / dimensions)
        cycles = original / wavelength
        if cycles > high:
            divisors.append(1.0)
        elif cycles < low:
            divisors.append(rope.factor)
        else:
            kept = (cycles - low) / (high - low)
            divisors.append(1.0 / (kept + (1.0 - kept) / rope.factor))
    return torch.tensor(divisors, dtype=torch.float32)


def longrope_attention_factor(rope: RopeSettings, context: int) -> float:
    """What longrope multiplies cosines and sines with: sqrt(1 + ln(stretch) / ln(original)), at least 1.

    Args:
        rope: Settings of kind `longrope`.
        context: The configuration's `max_position_embeddings`.
    """
    if rope.section.has("attention_factor"):
        return rope.section.real("attention_factor")
    original = rope.original_context(context)
    stretch = rope.section.real("factor") if rope.section.has("factor") else context / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
