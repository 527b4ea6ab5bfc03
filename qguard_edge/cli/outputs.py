"""What every command does about the files that it reads and writes, before it does anything else: see `convert.outputs`."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import typer

OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]

_until_the_end: ContextVar[ExitStack] = ContextVar("_until_the_end")


@contextmanager
def command() -> Iterator[None]:
    """Around a command: what `hold` took is given back at its end."""
    with ExitStack() as stack:
        before = _until_the_end.set(stack)
        try:
            yield
        finally:
            _until_the_end.reset(before)


def hold(paths: Mapping[str, Path | None], inputs: Iterable[Path | str | None], *, overwrite: bool) -> None:
    """Refuse output files that may not be written, and hold their names until the command ends.

    Args:
        paths: each under the name of its option, dashes included; None: not asked for.
        inputs: what the command reads; a hub id is passed over.
        overwrite: whether existing files may be replaced.

    Raises:
        OutputError: naming the file and the way out.
    """
    from convert.outputs import Written, writing

    written = [Written(path, option) for option, path in paths.items() if path is not None]
    _until_the_end.get().enter_context(writing(written, inputs, overwrite=overwrite))


def model_exists(model: str) -> None:
    """Say at once that a model is not there, before anything heavy is loaded; a hub id is passed over.

    Raises:
        SourceError: neither a path nor something that could be a hub id.
    """
    from convert.missing import check_exists

    check_exists(model)


def files_exist(paths: Mapping[str, Path | None]) -> None:
    """As `model_exists`, for paths that cannot be hub ids, each under the name of its option.

    Raises:
        SourceError: naming the option and the path.
    """
    from convert.missing import SourceError

    for option, path in paths.items():
        if path is not None and not path.exists():
            raise SourceError(f"{option}: there is no file or folder {path}")


def make_folder(folder: Path, option: str = "--output") -> None:
    """Make the folder that a command puts its files into.

    Raises:
        OutputError: it is there and no folder, or cannot be made.
    """
    from convert.atomic import OutputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the output folder {folder} cannot be made ({error.strerror}); choose another with {option}"
        ) from error
