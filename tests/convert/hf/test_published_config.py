"""What today's transformers makes of a configuration, in the words that llama.cpp's converter looks for."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from convert.published_config import as_published

HYBRID = ["linear_attention", "mlp", "full_attention", "mlp"]


def read_by_transformers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As the converter reads it."""
    (folder / "config.json").write_text(json.dumps(config))
    return dict(transformers.AutoConfig.from_pretrained(folder).to_dict())


def test_what_transformers_leaves_out_is_put_back(tmp_path: Path) -> None:
    written = {
        "model_type": "gemma4_text",
        "architectures": ["Gemma4ForCausalLM"],
        "global_head_dim": 128,
        "num_hidden_layers": 6,
    }
    read = read_by_transformers(written, tmp_path)
    assert "global_head_dim" not in read  # else this module is not needed for it any more
    done = as_published(read, written)
    assert done["global_head_dim"] == 128
    assert {key: done[key] for key in read} == read


def test_nothing_that_transformers_says_is_replaced() -> None:
    read = {"text_config": {"a": 1}, "rope_parameters": {"rope_theta": 5.0}, "n": None}
    written = {"text_config": {"a": 2, "b": 3}, "rope_parameters": None, "n": 4, "architectures": None}
    assert as_published(read, written) == {
        "text_config": {"a": 1, "b": 3}, "rope_parameters": {"rope_theta": 5.0}, "n": None, "architectures": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "pattern", "mixture"), [(HYBRID, "M-*-", False), ([*HYBRID[:-1], "moe"], "M-*E", True), (["?"], None, True)]
)
def test_a_nemotron_that_is_no_mixture_is_not_taken_for_one(kinds: list[str], pattern: str | None, mixture: bool) -> None:
    read = {"layers_block_type": kinds, "num_experts_per_tok": 2}
    done = as_published(read, {"architectures": ["NemotronHForCausalLM"]})
    assert done.get("hybrid_override_pattern") == pattern
    assert ("num_experts_per_tok" in done) is mixture


def test_layers_of_a_hybrid_granite() -> None:
    read = {"layer_types": ["linear_attention", "full_attention", "mamba"]}
    done = as_published(read, {"architectures": ["GraniteMoeHybridForCausalLM"]})
    assert done["layer_types"] == ["mamba", "attention", "mamba"]
    assert read["layer_types"][0] == "linear_attention"


def test_rotary_dimensions_of_minimax() -> None:
    read = {"head_dim": 128, "rope_parameters": {"partial_rotary_factor": 0.5}}
    assert as_published(read, {"architectures": ["MiniMaxM2ForCausalLM"]})["rotary_dim"] == 64
    assert as_published(read, {"architectures": ["MiniMaxM2ForCausalLM"], "rotary_dim": 32})["rotary_dim"] == 32
