"""Every family: a small random model gives the same logits in llama.cpp and in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.hf.base import describe_folder, write_base_gguf
from convert.hf.families import built_in
from convert.hf.rope import RopeKind
from tests.helpers.hf_llama import exact_llama
from tests.helpers.hf_models import (
    CASES,
    LLAMA3,
    PROMPTS,
    Case,
    make_model,
    reference_logits,
    relative_error,
    rope,
    save_model,
)
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

# The three prompts are shorter than any sliding window that llama.cpp ignores, and longer than those it
# honours.
TOKENIZER = train_byte_bpe(digits_then_bytes())


def converted(case: Case, folder: Path, outfile: Path) -> Any:
    model = make_model(case)
    save_model(case, model, folder)
    save_tokenizer(TOKENIZER, folder)
    write_base_gguf(folder, outfile, base_type="f32")
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_equal_transformers(case: Case, tmp_path: Path) -> None:
    model = converted(case, tmp_path / "model", tmp_path / "base.gguf")
    report = describe_folder(tmp_path / "model")
    assert report.family == case.family
    assert report.base_type == "f32"
    assert any(case.warns in warning for warning in report.warnings) or not case.warns
    errors = []
    with exact_llama(tmp_path / "base.gguf") as llama:
        for prompt in PROMPTS:
            tokens = llama.tokenize(prompt)
            assert tokens == TOKENIZER.encode(prompt).ids
            reference, ours = reference_logits(model, tokens), llama.logits(tokens)
            errors.append(relative_error(ours, reference))
            assert np.array_equal(ours.argmax(axis=1), reference.argmax(axis=1))
    assert max(errors) <= case.tolerance


STRETCHED = {
    RopeKind.LINEAR: rope("linear", 50000.0, factor=4.0),
    RopeKind.YARN: rope("yarn", 50000.0, factor=4.0, original_max_position_embeddings=64),
    RopeKind.LLAMA3: LLAMA3,
    RopeKind.LONGROPE: rope("longrope", short_factor=[1.5] * 32, long_factor=[2.0 + i / 8 for i in range(32)]),
}
ORDINARY = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3-tied",
    "Qwen3Moe": "qwen3-moe",
    "SmolLM3": "smollm3",
    "Gemma": "gemma",
    "Gemma2": "gemma2",
    "Phi": "phi-gqa",
    "Phi3": "phi3",
    "Starcoder2": "starcoder2",
}
CLAIMED = [
    (family.__name__, kind)
    for family in built_in()
    for kind in sorted(family.rope_kinds)
    if family.__name__ in ORDINARY and kind is not RopeKind.DEFAULT
]


def test_every_family_with_rope_is_listed() -> None:
    # Gemma 3 has two kinds of RoPE settings and its own cases; GPT-2 and GPTBigCode have learned positions.
    without = {"Gemma3", "Gemma3Multimodal", "GPT2", "GPTBigCode"}
    assert {family.__name__ for family in built_in()} == set(ORDINARY) | without


@pytest.mark.parametrize(("family", "kind"), CLAIMED, ids=lambda value: str(value))
def test_every_claimed_rope_scaling(family: str, kind: RopeKind, tmp_path: Path) -> None:
    ordinary = next(case for case in CASES if case.name == ORDINARY[family])
    options = {**ordinary.options, "max_position_embeddings": 256, **STRETCHED[kind]}
    if kind is RopeKind.LONGROPE:
        options["original_max_position_embeddings"] = 16
    if family == "Phi":
        options["rope_parameters"] = {**options["rope_parameters"], "partial_rotary_factor": 0.25}
    case = replace(ordinary, options=options)
    model = converted(case, tmp_path / "model", tmp_path / "base.gguf")
    tokens = TOKENIZER.encode(PROMPTS[2]).ids
    with exact_llama(tmp_path / "base.gguf") as llama:
        ours = llama.logits(tokens)
    assert relative_error(ours, reference_logits(model, tokens)) <= case.tolerance
