"""What a person sees: tables on standard output, progress and notes on standard error, one JSON document with `--json`."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from qguard_edge.report.document import json_text

# Piped output has no width of its own: 80 columns would cut the tables.
out = Console(width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, width=None if sys.stderr.isatty() else 140)

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a command on standard output."""
    sys.stdout.write(json_text(document))


def size_text(n_bytes: float) -> str:
    """A size for people: 93.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def count_text(count: float) -> str:
    """A count for people: 134.5 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"


def alignment_text(alignment: float) -> str:
    """An alignment with its start: 1.00 -> 0.00."""
    return f"1.00 -> {alignment + 0.0 if abs(alignment) >= 0.005 else 0.0:.2f}"


def percent(share: float) -> str:
    """A share as 12.3%."""
    return f"{share:.1%}"


def table(title: str, *columns: str) -> Table:
    """An empty table; columns whose name starts with `>` are right-aligned."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    return made


class ConsoleProgress:
    """Draws the stages of `qguard_edge.progress.Progress` as bars on standard error.

    Off when standard error is not a terminal, in CI, or with `--quiet`; notes are still written unless quiet.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.enabled = err.is_terminal and not quiet and not os.environ.get("CI")
        self._bars: Progress | None = None
        self._task: Any = None

    def stage(self, name: str, total: int, unit: str) -> None:
        """See `Progress.stage`."""
        if not self.enabled:
            return
        if self._bars is None:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[detail]}"),
                console=err,
            )
            self._bars.start()
        self._finish_task()
        self._task = self._bars.add_task(name, total=total or None, unit=unit, detail="")

    def advance(self, count: int, detail: str = "") -> None:
        """See `Progress.advance`."""
        if self._bars is not None:
            self._bars.update(self._task, advance=count, detail=detail)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        if not self.quiet:
            err.print(text, highlight=False)

    def _finish_task(self) -> None:
        if self._bars is not None and self._task is not None:
            task = next(task for task in self._bars.tasks if task.id == self._task)
            self._bars.update(self._task, completed=task.total or task.completed, total=task.total or 1, detail="")

    def __enter__(self) -> "ConsoleProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._finish_task()
            self._bars.stop()
            self._bars = None


def check_report_file(path: Path | None) -> None:
    """Refuse `--report FILE` before any work is done.

    Raises:
        OutputError: it cannot be written.
    """
    if path:
        from convert.atomic import check_writable

        check_writable(path, "--report")


def deliver(
    document: Mapping[str, Any], show: Callable[[], None], *, report_file: Path | None, json_output: bool, quiet: bool
) -> None:
    """What a conversion ends with: the report file, then the one JSON document or (unless quiet) the tables of `show`."""
    if report_file:
        from convert.atomic import atomic_path

        with atomic_path(report_file) as temporary:
            temporary.write_text(json_text(document))
    if json_output:
        print_json(document)
    elif not quiet:
        show()
