"""How far a file is from another, held against transformers."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qguard_edge.runtimes.fidelity import TextError, measure_fidelity, read_texts

TEXTS = ["The quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b\n\nprint(add(1, 2))"]


def test_a_file_is_at_no_distance_from_itself(tiny_base: Path) -> None:
    same = measure_fidelity(tiny_base, tiny_base, TEXTS, max_tokens=64)
    assert (same.mean_kl, same.kl_999, same.same_top, same.perplexity_ratio) == (0.0, 0.0, 1.0, 1.0)
    assert same.n_texts == 2


def test_fidelity_is_what_transformers_says(tiny_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Two full-precision models: the base, and one whose output head is damped, so that both can run in torch too."""
    from convert.hf.base import write_base_gguf

    full = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    other.bfloat16().save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    write_base_gguf(tmp_path / "other", tmp_path / "other.gguf")
    measured = measure_fidelity(tiny_base, tmp_path / "other.gguf", TEXTS, max_tokens=64)
    kl, ratio, n = 0.0, 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            p, q = full(ids).logits[0, :-1].log_softmax(-1), other.float()(ids).logits[0, :-1].log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        following = ids[0, 1:, None]
        ratio += float((p.gather(1, following) - q.gather(1, following)).sum())
        n += len(p)
    assert measured.n_tokens == n
    assert measured.mean_kl == pytest.approx(kl / n, rel=0.01)
    assert measured.perplexity_ratio == pytest.approx(math.exp(ratio / n), rel=0.01)
    low, high = measured.mean_kl_interval
    assert low <= measured.mean_kl <= high


def test_texts_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one\nline\n\n\n two \n")
    assert read_texts(path) == ["one\nline", "two"]
    path.write_text("\n\n")
    with pytest.raises(TextError, match="no text"):
        read_texts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="UTF-8"):
        read_texts(path)
