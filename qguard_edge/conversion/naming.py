"""Names of a conversion's files."""

from pathlib import Path


def from_template(template: str | Path, type_name: str) -> Path:
    """The output's path: `{ftype}` and `{FTYPE}` become the type's name."""
    return Path(str(template).replace("{ftype}", type_name.lower()).replace("{FTYPE}", type_name.upper())).expanduser()


def plain_path(outfile: Path) -> Path:
    """Where `--keep-plain` puts llama.cpp's own file."""
    return outfile.with_name(f"{outfile.stem}.plain{outfile.suffix}")


def mmproj_path(outfile: Path, name: str, kind: str) -> Path:
    """Name of the vision or audio half beside an output, as llama.cpp's converter names it: `mmproj-NAME-F16.gguf`."""
    return outfile.with_name(f"mmproj-{name}-{kind.upper()}.gguf")


def rejected_path(outfile: Path) -> Path:
    """The name of a file that failed its verification: `NAME.rejected.gguf`; of a folder `NAME.rejected`."""
    if outfile.suffix != ".gguf":
        return outfile.with_name(f"{outfile.name}.rejected")
    return outfile.with_name(f"{outfile.stem}.rejected{outfile.suffix}")


def checkpoint_path(outfile: Path) -> Path:
    """Where an unfinished learned conversion keeps its state."""
    return outfile.with_name(f".{outfile.name}.checkpoint")
