"""Names of a conversion's files, checked before any work is done."""

from pathlib import Path

from convert.atomic import OutputError, check_writable
from convert.source import Source


def from_template(template: str | Path, type_name: str) -> Path:
    """The output's path: `{ftype}` and `{FTYPE}` become the type's name."""
    return Path(str(template).replace("{ftype}", type_name.lower()).replace("{FTYPE}", type_name.upper())).expanduser()


def plain_path(outfile: Path) -> Path:
    """Where `--keep-plain` puts llama.cpp's own file."""
    return outfile.with_name(f"{outfile.stem}.plain{outfile.suffix}")


def rejected_path(outfile: Path) -> Path:
    """The name of a file that failed its verification: `NAME.rejected.gguf`; of a folder `NAME.rejected`."""
    if outfile.suffix != ".gguf":
        return outfile.with_name(f"{outfile.name}.rejected")
    return outfile.with_name(f"{outfile.stem}.rejected{outfile.suffix}")


def checkpoint_path(outfile: Path) -> Path:
    """Where an unfinished learned conversion keeps its state."""
    return outfile.with_name(f".{outfile.name}.checkpoint")


def check_output(targets: tuple[Path, ...], inputs: tuple[Path, ...], *, overwrite: bool) -> None:
    """Refuse output files that cannot be written or must not be replaced.

    Args:
        targets: files to be written.
        inputs: files that are read.
        overwrite: whether existing files may be replaced; never an input.

    Raises:
        OutputError: naming the file and the way out.
    """
    for target in targets:
        check_writable(target)
        if target.exists() and any(source.exists() and target.samefile(source) for source in inputs):
            raise OutputError(f"input and output are the same file, {target.name}; choose another with --outfile")
        if target.exists() and not overwrite:
            raise OutputError(f"{target.name} exists; pass --overwrite to replace it or choose another with --outfile")


def input_files(source: Source) -> tuple[Path, ...]:
    """Files of a source that an output must not replace."""
    return (source.path,) if source.is_gguf else ()
