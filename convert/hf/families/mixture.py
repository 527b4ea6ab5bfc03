"""Families with a mixture of experts in place of the feed-forward block."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from convert.hf.families.decoder import Qwen3
from convert.hf.families.family import Geometry
from convert.hf.families.part import Part, Setting, count, linear
from convert.hf.transforms import Stack


class Qwen3Moe(Qwen3):
    """Qwen3-MoE: a router picks a few of many small feed-forward blocks for each token.

    A checkpoint keeps each expert's matrices apart; a GGUF stacks them into one tensor per kind.
    """

    title = "Qwen3-MoE"
    architectures = ("Qwen3MoeForCausalLM",)
    target = gguf.MODEL_ARCH.QWEN3MOE

    def check(self) -> None:
        """Refuses dense layers in between, and router weights that are not renormalised."""
        super().check()
        self.require("decoder_sparse_step", 1, default=1)
        self.require("mlp_only_layers", [], default=[])
        self.require("norm_topk_prob", True, default=False)

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return self.config.integer("num_experts", "num_local_experts", high=4096)

    @property
    def expert_width(self) -> int:
        """Inner width of an expert."""
        return self.config.integer("moe_intermediate_size")

    def read_geometry(self) -> Geometry:
        """As for the dense models; `intermediate_size`, which no layer uses, may be missing."""
        self.config = type(self.config)(
            {"intermediate_size": self.config.integer("moe_intermediate_size"), **self.config.values},
            self.config.origin,
        )
        return super().read_geometry()

    def feed_forward(self, prefix: str) -> Iterator[Part]:
        """The router, then each kind of matrix stacked over the experts."""
        hidden, width = self.geometry.hidden, self.expert_width
        yield from linear(f"{prefix}gate", self.experts, hidden)
        for kind, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            sources = tuple(f"{prefix}experts.{i}.{kind}_proj.weight" for i in range(self.experts))
            yield Part(sources, shape, Stack(), name=f"{prefix}experts.{kind}_proj.weight")

    def settings(self) -> Iterator[Setting]:
        """Adds the numbers of experts."""
        yield from super().settings()
        yield count("expert_count", self.experts)
        yield count("expert_used_count", self.config.integer("num_experts_per_tok", high=self.experts))
        yield count("expert_feed_forward_length", self.expert_width)
