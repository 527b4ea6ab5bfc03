"""The full-precision GGUF of a model folder: written by the built-in converter, or by llama.cpp's own."""

from pathlib import Path
from typing import Protocol

from convert.hf.base import describe_folder, write_base_gguf
from convert.hf.external import find_converter, run_converter
from convert.source import Source
from quant_grids.errors import UnsupportedError


class Stages(Protocol):
    """Told what is being done; `qguard_edge.progress.Progress` is one."""

    def stage(self, name: str, total: int, unit: str) -> None:
        """A stage begins; `total` units will be done (0: unknown)."""

    def advance(self, count: int, detail: str = "") -> None:
        """`count` more units are done; `detail` says what is being worked on."""


def write_base(
    source: Source,
    path: Path,
    *,
    base_type: str | None,
    pre: str | None,
    converter: Path | None,
    progress: Stages,
) -> tuple[str, ...]:
    """Write the full-precision GGUF of a folder: built in, or by llama.cpp's own converter where one was named.

    `converter` is always followed; LLAMA_CPP_ROOT only for architectures that are not built in.

    Args:
        source: the model folder.
        path: the new file.
        base_type: f32, f16 or bf16; None keeps the checkpoint's.
        pre: pre-tokenizer name to force.
        converter: llama.cpp's convert_hf_to_gguf.py, or its checkout.
        progress: told about the stage.

    Returns:
        Warnings, one sentence each.
    """
    script = find_converter(converter)
    if script is not None and (converter is not None or not is_built_in(source.path)):
        progress.stage(f"Writing the base with {script.name}", 0, "lines")
        run_converter(script, source.path, path, base_type=base_type, on_line=lambda line: progress.advance(1, line[:60]))
        return (f"the base was made by {script.name}, which was not checked by qguard-edge",)
    progress.stage("Writing the base", 0, "B")
    done = 0

    def advance(name: str, count: int, total: int) -> None:
        nonlocal done
        if done == 0:
            progress.stage("Writing the base", total, "B")
        progress.advance(count - done, name)
        done = count

    report = write_base_gguf(source.path, path, base_type=base_type, pre=pre, name=source.name, progress=advance)
    return report.warnings


def is_built_in(folder: Path) -> bool:
    """Whether a folder's architecture is one that `convert.hf` knows."""
    try:
        describe_folder(folder)
    except UnsupportedError:
        return False
    return True
