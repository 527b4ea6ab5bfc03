"""The full-precision GGUF of a model folder: written by the built-in converter, or by llama.cpp's own."""

from pathlib import Path
from typing import Protocol

from convert.hf.base import describe_folder, write_base_gguf
from convert.hf.external import find_converter, run_converter
from convert.hf.families import family_for
from convert.hf.installed import INSTALL
from convert.hf.jsonfile import Section, read_json
from convert.hf.tokenizer.reader import guess_pre_tokenizer
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
    trust_remote_code: bool = False,
    allow_quantized: bool = False,
) -> tuple[str, ...]:
    """Write the full-precision GGUF of a folder: built in, or by llama.cpp's own converter.

    `converter` is always followed; LLAMA_CPP_ROOT only where the built-in converter refuses the folder, and what
    `qguard-edge converter install` fetched only where it does not know the architecture at all: a setting that llama.cpp would
    ignore stays an error.

    Args:
        source: the model folder.
        path: the new file.
        base_type: f32, f16 or bf16; None keeps the checkpoint's.
        pre: pre-tokenizer name to force.
        converter: llama.cpp's convert_hf_to_gguf.py, or its checkout.
        progress: told about the stage.
        trust_remote_code: let the external converter read a folder that brings Python code.
        allow_quantized: have what `qguard-edge converter install` fetched multiply out a checkpoint that is quantized already,
            where the built-in converter refuses it.

    Returns:
        Warnings, one sentence each.
    """
    method = quantized_by(source.path)
    asked = not knows_architecture(source.path) or bool(method and allow_quantized)
    script = find_converter(converter, with_installed=asked)
    if script is not None and (converter is not None or not is_built_in(source.path)):
        progress.stage(f"Writing the base with {script.name}", 0, "lines")
        run_converter(
            script,
            source.path,
            path,
            base_type=base_type,
            pre=pre,
            guessed_pre=guess_pre_tokenizer(source.path),
            trust_remote_code=trust_remote_code,
            on_line=lambda line: progress.advance(1, line[:60]),
        )
        again = f"the checkpoint was quantized before ({method}): its first rounding cannot be undone and is not protected"
        return (f"the base was made by {script.name}, which was not checked by qguard-edge", *((again,) if method else ()))
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


def write_mmproj(
    source: Source,
    path: Path,
    kind: str,
    *,
    converter: Path | None,
    progress: Stages,
    trust_remote_code: bool = False,
) -> None:
    """Write the vision or audio half of a folder, which llama.cpp keeps in a file of its own; only its own converter can.

    Args:
        source: the model folder.
        path: the new file.
        kind: f32, f16, bf16 or q8_0.
        converter: as for `write_base`.
        progress: told about the stage.
        trust_remote_code: as for `write_base`.

    Raises:
        UnsupportedError: the folder has no such half, or no converter is found.
    """
    if not other_halves(source.path):
        raise UnsupportedError(f"--mmproj: {source.name} has no vision or audio half; leave the option out")
    script = find_converter(converter)
    if script is None:
        raise UnsupportedError(f"--mmproj needs llama.cpp's converter: run `{INSTALL}` once, or pass --converter PATH")
    progress.stage(f"Writing the {' and '.join(other_halves(source.path))} half with {script.name}", 0, "lines")
    run_converter(
        script,
        source.path,
        path,
        base_type=kind,
        trust_remote_code=trust_remote_code,
        mmproj=True,
        on_line=lambda line: progress.advance(1, line[:60]),
    )


def other_halves(folder: Path) -> tuple[str, ...]:
    """What a folder's model has beside the language half: vision, audio, both, or nothing."""
    config = read_json(folder / "config.json")
    return tuple(half for half in ("vision", "audio") if config.get(f"{half}_config"))


def quantized_by(folder: Path) -> str:
    """The method by which a folder's checkpoint is quantized, by its own account; empty if it is not."""
    settings = read_json(folder / "config.json").get("quantization_config")
    return str(settings.get("quant_method") or "an unnamed method") if isinstance(settings, dict) and settings else ""


def is_built_in(folder: Path) -> bool:
    """Whether a folder's architecture is one that `convert.hf` knows."""
    try:
        describe_folder(folder)
    except UnsupportedError:
        return False
    return True


def knows_architecture(folder: Path) -> bool:
    """Whether `convert.hf` has a family for a folder's architecture, whatever it says to its settings."""
    try:
        family_for(Section(read_json(folder / "config.json"), "config.json"))
    except UnsupportedError:
        return False
    return True
