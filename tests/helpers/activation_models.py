"""Tiny models of several architectures as GGUF and in transformers, and sums over their inputs by hooks of these tests' own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from convert.gguf_file import GgufModel
from convert.hf.base import write_base_gguf
from qguard_edge.runtimes.hf import HfModel
from tests.helpers.hf_models import CASES, make_model, save_model
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

TOKENIZER = train_byte_bpe(digits_then_bytes())


@dataclass(frozen=True)
class Pair:
    """One model, twice."""

    base: GgufModel
    loaded: HfModel


def make_pair(name: str, folder: Path, *, base_type: str = "f32", **changes: int) -> Pair:
    """The case of that name in `hf_models`; as f32, so that both programs compute nearly the same."""
    case = next(case for case in CASES if case.name == name)
    case = replace(case, options={**case.options, **changes})
    model = make_model(case)
    save_model(case, model, folder / "model")
    save_tokenizer(TOKENIZER, folder / "model")
    write_base_gguf(folder / "model", folder / "base.gguf", base_type=base_type)
    config: Any = model.config
    return Pair(GgufModel(folder / "base.gguf"), HfModel(model, None, config.model_type, config.num_hidden_layers))


def texts(lengths: tuple[int, ...] = (48, 48, 31, 48, 5), seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def inputs_of(model: Any, paths: list[str], rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """All rows that reach each module on these texts: f64 `[n, columns]`."""
    modules, seen = dict(model.named_modules()), dict[str, list[torch.Tensor]]()

    def hook(path: str) -> Any:
        def keep(_module: Any, given: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(path, []).append(given[0].reshape(-1, given[0].shape[-1]).double())

        return modules[path].register_forward_pre_hook(keep)

    handles = [hook(path) for path in paths]
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return {path: torch.cat(found) for path, found in seen.items()}


def distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((ours.double() - expected.double()).norm() / expected.double().norm())
