"""transformers reads the weights that the conversion reads, or nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convert.hf.checkpoint import Checkpoint
from qguard_edge.runtimes.hf import HfLoadError, load_hf_model


def test_a_pickle_is_not_taken_in_place_of_safetensors(tiny_folder: Path, tmp_path: Path) -> None:
    """The conversion takes the only safetensors file by any name; transformers looks for one name, then for a pickle."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = (folder / "model.safetensors").rename(folder / "weights.safetensors")
    other = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    torch.save(other, folder / "pytorch_model.bin")
    assert Checkpoint.open(folder).tensors.keys() == other.keys()
    with pytest.raises(HfLoadError, match="safetensors"):
        load_hf_model(folder)


def test_named_as_usual_they_are_loaded(tiny_folder: Path) -> None:
    loaded = load_hf_model(tiny_folder, dtype=torch.bfloat16)
    stored = load_file(tiny_folder / "model.safetensors")
    assert torch.equal(loaded.model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
