"""The outputs of `convert` that are Hugging Face folders: their names, importable without torch."""

from dataclasses import dataclass

from quant_grids.errors import UnsupportedError


@dataclass(frozen=True)
class FolderFormat:
    """One of them.

    Attributes:
        name: for `--to`.
        summary: one line.
        bits: per weight of a quantized matrix, scales included; None for full precision.
        main_type: how most weights are stored.
    """

    name: str
    summary: str
    bits: float | None
    main_type: str


FOLDER_TARGETS = {
    target.name: target
    for target in (
        FolderFormat("nf4", "bitsandbytes checkpoint, 4-bit normal float", 4.5, "NF4"),
        FolderFormat("fp4", "bitsandbytes checkpoint, 4-bit float", 4.5, "FP4"),
        FolderFormat("int8", "bitsandbytes checkpoint, LLM.int8", 8.0, "INT8"),
        FolderFormat(
            "hf",
            "full precision, moved so that bitsandbytes itself rounds it to the chosen codes (--target)",
            None,
            "as given",
        ),
    )
}
KINDS = ("nf4", "fp4", "int8")


def is_folder_target(to: str) -> bool:
    """Whether `--to` names a folder."""
    return to.strip().lower() in FOLDER_TARGETS


def kinds_of(to: str, target: str | None) -> tuple[str, ...]:
    """The formats that a folder is made for.

    Args:
        to: `--to`.
        target: `--target`, only with `--to hf`; None means all.

    Raises:
        UnsupportedError: no such target, or one given where none is needed.
    """
    name = to.strip().lower()
    if name != "hf":
        if target is not None:
            raise UnsupportedError(f"--target goes with --to hf; --to {name} is its own target")
        return (name,)
    wanted = (target or "all").strip().lower()
    if wanted == "all":
        return KINDS
    if wanted not in KINDS:
        raise UnsupportedError(f"--target {target!r}: choose one of {', '.join(KINDS)}, all")
    return (wanted,)
