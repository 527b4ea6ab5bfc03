"""Hugging Face checkpoints, changed on purpose."""

from pathlib import Path

from safetensors.torch import load_file, save_file


def copy_with(source: Path, target: Path, name: str, value: float) -> Path:
    """A copy of a model folder with the first weight of one tensor replaced."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    tensors[name][0, 0] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
