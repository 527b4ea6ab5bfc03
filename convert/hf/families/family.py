"""What a model family has to say about itself.

A family is a class that names the transformers architectures it covers and the llama.cpp architecture they
become, and answers two questions from a configuration:

* `parts()`: which GGUF tensors there are, and from which checkpoint tensors, of which shape, each is made;
* `settings()`: which metadata llama.cpp needs to build the same network.

Everything else (finding the files, checking every shape before a byte is written, streaming, the tokenizer,
the general metadata) is the same for all families and lives outside. Subclasses register themselves by
existing; two families claiming one architecture is an error at import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gguf
import torch

from convert.hf.families.part import Part, Setting, computed, count, number
from convert.hf.jsonfile import MAX_DIMENSION, Section
from convert.hf.rope import RopeKind, RopeSettings, llama3_divisors, longrope_attention_factor, read_rope
from quant_grids.errors import FormatError, UnsupportedError

WAYS_OUT = (
    "use llama.cpp's own converter with --converter PATH/convert_hf_to_gguf.py (or set LLAMA_CPP_ROOT), "
    "or give a ready F16/BF16 GGUF"
)

INSTALL_FIRST = "run `qguard-edge converter install` once and try again"


MAX_LAYERS = 512
"""llama.cpp's own limit (LLAMA_MAX_LAYERS)."""


@dataclass(frozen=True)
class Geometry:
    """The widths of a decoder-only transformer, whatever its configuration calls them.

    Attributes:
        hidden: Width of the residual stream.
        layers: Number of blocks.
        heads: Attention heads.
        kv_heads: Key/value heads; `heads` is a multiple of it.
        head_dim: Width of a head.
        feed_forward: Inner width of the (dense) feed-forward block.
        vocabulary: Rows of the embedding.
        context: Longest position the configuration allows.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    context: int

    @property
    def q_rows(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim


class Family(ABC):
    """A group of architectures that are converted the same way.

    Class attributes:
        title: Name for people, with the models it covers.
        architectures: Names in config.json's `architectures`.
        target: llama.cpp's architecture.
        base_prefix: Prefix of the checkpoint's tensor names below the language-model head; some checkpoints
            (GPT-2's) leave it out, and are read as if they had it.
        activations: Accepted values of the configuration's activation, the ones llama.cpp's graph computes.
        rope_kinds: RoPE stretchings llama.cpp's graph for the target honours; empty when it has no RoPE.
        rope_layers: Which of `rope_parameters`' objects the plain keys are about, when there is one per kind
            of layer.
        default_theta: RoPE base of a configuration that names none.
        tied_by_default: What a configuration without `tie_word_embeddings` means in transformers.
        ignored: Suffixes of checkpoint tensors that hold no weights.
    """

    title: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    target: ClassVar[gguf.MODEL_ARCH]
    base_prefix: ClassVar[str] = "model."
    activations: ClassVar[frozenset[str]] = frozenset({"silu"})
    rope_kinds: ClassVar[frozenset[RopeKind]] = frozenset({RopeKind.DEFAULT, RopeKind.LINEAR, RopeKind.YARN})
    rope_layers: ClassVar[str | None] = None
    default_theta: ClassVar[float] = 10000.0
    tied_by_default: ClassVar[bool] = False
    ignored: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)

    registry: ClassVar[dict[str, type[Family]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for architecture in cls.__dict__.get("architectures", ()):
            if architecture in Family.registry:
                raise TypeError(f"{architecture} is claimed by {Family.registry[architecture]} and {cls}")
            Family.registry[architecture] = cls

    def __init__(self, config: Section) -> None:
        self.config = config
        self.geometry = self.read_geometry()
        self.tied = config.flag("tie_word_embeddings", self.tied_by_default)
        self.warnings: list[str] = []
        self.check()

    # What a family fills in.

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """Every tensor of the GGUF, in file order."""

    @abstractmethod
    def settings(self) -> Iterator[Setting]:
        """Every metadata entry below the architecture's prefix."""

    def check(self) -> None:
        """Refuses configurations that llama.cpp would compute differently; overriders call super().

        Raises:
            UnsupportedError: A setting has no counterpart in llama.cpp's graph.
        """
        name = self.config.text("hidden_activation", "hidden_act", "activation_function", default=self.default_activation())
        if name not in self.activations:
            known = ", ".join(sorted(self.activations))
            raise UnsupportedError(
                f"config.json asks for the activation {name!r}, but llama.cpp computes this architecture with {known}; "
                f"{WAYS_OUT}."
            )

    def require(self, key: str, value: object, default: object) -> None:
        """Refuses a configuration whose `key` (or its default) is not `value`, the one llama.cpp computes with."""
        actual = self.config.values.get(key, default)
        if actual != value:
            raise UnsupportedError(
                f"config.json sets {key} to {actual!r:.60}, but llama.cpp's graph for this architecture always works "
                f"as if it were {value!r}; {WAYS_OUT}."
            )

    def canonical_names(self, names: Collection[str]) -> dict[str, str]:
        """Names as `parts` writes them -> names in the checkpoint.

        Adds a prefix that the checkpoint leaves out. Names that are left out of the result are not converted.
        """
        if any(name.startswith(self.base_prefix) for name in names):
            return {name: name for name in names}
        return {name if name.startswith("lm_head.") else self.base_prefix + name: name for name in names}

    def default_activation(self) -> str:
        """The activation when the configuration names none."""
        return min(self.activations)

    def read_geometry(self) -> Geometry:
        """Widths under the names most configurations use; GPT-2's relatives override this."""
        c = self.config
        hidden = c.integer("hidden_size")
        heads = c.integer("num_attention_heads")
        return self.checked(
            Geometry(
                hidden=hidden,
                layers=c.integer("num_hidden_layers", high=MAX_LAYERS),
                heads=heads,
                kv_heads=c.integer("num_key_value_heads", default=heads),
                head_dim=c.integer("head_dim", default=max(hidden // heads, 1)),
                feed_forward=c.integer("intermediate_size"),
                vocabulary=c.integer("vocab_size"),
                context=c.integer("max_position_embeddings", default=2048, high=MAX_DIMENSION * 16),
            )
        )

    def checked(self, geometry: Geometry) -> Geometry:
        """Returns the geometry after the relations every family relies on; raises FormatError otherwise."""
        if geometry.heads % geometry.kv_heads:
            raise FormatError(
                f"{self.config.origin}: {geometry.heads} attention heads are not a multiple of "
                f"{geometry.kv_heads} key/value heads."
            )
        if geometry.head_dim % 2:
            raise FormatError(f"{self.config.origin}: head_dim {geometry.head_dim} is odd; RoPE pairs dimensions.")
        return geometry

    # What families share.

    def common_settings(self) -> Iterator[Setting]:
        """The metadata every decoder needs."""
        g = self.geometry
        yield count("block_count", g.layers)
        yield count("context_length", g.context)
        yield count("embedding_length", g.hidden)
        yield count("feed_forward_length", g.feed_forward)
        yield count("attention.head_count", g.heads)
        yield count("attention.head_count_kv", g.kv_heads)
        yield count("vocab_size", g.vocabulary)

    @property
    def rotated(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return self.geometry.head_dim

    def rope(self, layers: str | None = None) -> RopeSettings:
        """The rotary settings, refused when llama.cpp's graph for the target would ignore them."""
        rope = read_rope(self.config, layers=layers or self.rope_layers, default_theta=self.default_theta)
        if rope.kind not in self.rope_kinds:
            raise UnsupportedError(
                f"llama.cpp's {gguf.MODEL_ARCH_NAMES[self.target]} graph has no {rope.kind} RoPE scaling; {WAYS_OUT}."
            )
        return rope

    def rope_settings(self) -> Iterator[Setting]:
        """Metadata of the rotary settings."""
        rope = self.rope()
        yield count("rope.dimension_count", self.rotated)
        yield number("rope.freq_base", rope.theta)
        kind = rope.kind
        if kind in (RopeKind.LINEAR, RopeKind.YARN, RopeKind.LONGROPE):
            yield Setting("rope.scaling.type", str(kind), gguf.GGUFValueType.STRING)
        if kind in (RopeKind.LINEAR, RopeKind.YARN):
            yield number("rope.scaling.factor", rope.factor)
        if kind in (RopeKind.YARN, RopeKind.LONGROPE):
            yield count("rope.scaling.original_context_length", rope.original_context(self.geometry.context))
        if kind is RopeKind.YARN:
            yield from self._yarn_settings(rope)
        if kind is RopeKind.LONGROPE:
            yield number("rope.scaling.attn_factor", longrope_attention_factor(rope, self.geometry.context))

    def _yarn_settings(self, rope: RopeSettings) -> Iterator[Setting]:
        attention = rope.yarn_attention_ratio()
        if attention != 1.0:
            yield number("rope.scaling.attn_factor", attention)
        for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            value = rope.section.real(key, default=usual)
            yield number(f"rope.scaling.yarn_{key}", value)
            if value != usual:
                self.warnings.append(f"llama.cpp ignores YaRN's {key} = {value:g} for this architecture and uses {usual:g}.")

    def rope_parts(self) -> Iterator[Part]:
        """The tensors that some kinds of stretching need (see `convert.hf.rope`)."""
        rope, rotated = self.rope(), self.rotated
        if rope.kind is RopeKind.LLAMA3:
            yield computed("rope_freqs.weight", llama3_divisors(rope, rotated))
        if rope.kind is RopeKind.LONGROPE:
            for length in ("long", "short"):
                factors = torch.tensor(rope.section.reals(f"{length}_factor", rotated // 2), dtype=torch.float32)
                yield computed(f"rope_factors_{length}.weight", factors)

    def note_window(self, window: int | None) -> None:
        """Warns when the model limits attention to a window that llama.cpp's graph for it does not have."""
        if window is not None and window < self.geometry.context:
            self.warnings.append(
                f"This model attends to the last {window} tokens only; llama.cpp attends to all of them for this "
                f"architecture, so its answers may differ on prompts longer than {window} tokens."
            )


def family_for(config: Section) -> type[Family]:
    """Finds the family of a configuration.

    Raises:
        FormatError: config.json names no architecture.
        UnsupportedError: No family covers it; the message names the ways out.
    """
    names: Sequence[Any] = config.values.get("architectures") or ()
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{config.origin} names no architectures; is this a transformers model folder?")
    for name in names:
        if name in Family.registry:
            return Family.registry[name]
    raise UnsupportedError(f"The architecture {names[0][:80]} is not built in; {INSTALL_FIRST}, {WAYS_OUT}.")
