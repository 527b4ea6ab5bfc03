"""What a person sees: tables on standard output, progress and notes on standard error, one JSON document with `--json`."""

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qguard_edge.progress import Remaining
from qguard_edge.report.document import json_text

_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LONGEST = 4000  # characters of one text that is printed; what is longer came from a file that wants to fill the screen


def visible(text: str) -> str:
    """Text that may be printed: control characters (escape sequences among them) are shown, not sent, and length has a limit."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)"
    return "".join(c if c in "\n\t" or not _controls(c) else _shown(c) for c in cut)


def _controls(character: str) -> bool:
    """Control characters, half surrogate pairs, and what changes the direction of text."""
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS


def _shown(character: str) -> str:
    return chr(0x2400 + ord(character)) if ord(character) < 32 else "\ufffd"


def styled(template: str, **values: object) -> Text:
    """Text with rich's markup, in which `{name}` stands for a value: the only way to print markup.

    Args:
        template: ours.
        values: of foreign origin, perhaps: their markup and control characters are shown as they are.
    """
    shown = {name: escape(visible(str(value))) for name, value in values.items()}
    return Text.from_markup(template.format(**shown), emoji=False)


class PlainConsole(Console):
    """Prints text as text: markup, emoji codes and control characters in it mean nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console.render_str`; called for every string that is printed, in tables too."""
        return super().render_str(visible(text), **options)


# Piped output has no width of its own: 80 columns would cut the tables.
out = PlainConsole(width=None if sys.stdout.isatty() else 140)
err = PlainConsole(stderr=True, width=None if sys.stderr.isatty() else 140)

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


def say(console: Console, text: str | Text, *, indent: int = 0, style: str = "") -> None:
    """A sentence: broken between words on a terminal, one line where it is piped, so that it can be searched for."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent), style=style, expand=False), highlight=False)
    else:
        console.print(" " * indent, text, sep="", style=style, highlight=False, soft_wrap=True)


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a command on standard output."""
    sys.stdout.write(json_text(document))


def duration_text(seconds: float) -> str:
    """A time for people: 48 s, 14 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


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
    """An empty table; columns whose name starts with `>` are right-aligned, and nothing is cut off."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return made


LINE_SECONDS = 15.0
"""Between two lines of progress where there is no terminal; a command that is done sooner writes none."""


class _Lines:
    """Progress for a file or a pipe: a line now and then."""

    def __init__(self) -> None:
        self._name, self._unit, self._total, self._done = "", "", 0, 0
        self._started = self._last = time.monotonic()

    def stage(self, name: str, total: int, unit: str) -> None:
        self._name, self._unit, self._total, self._done = name, unit, total, 0
        self._show()

    def advance(self, count: int) -> None:
        self._done += count
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        share = f": {self._done} of {self._total} {self._unit}" if self._total else ""
        err.print(f"{now - self._started:.0f} s  {self._name}{share}", highlight=False, markup=False)


class ConsoleProgress:
    """Draws the stages of `qguard_edge.progress.Progress` as bars on standard error.

    Where standard error is not a terminal, and in CI, there is a line every `LINE_SECONDS` instead. Nothing with `--quiet`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.enabled = err.is_terminal and not quiet and not os.environ.get("CI")
        self._bars: Progress | None = None
        self._task: Any = None
        self._lines = _Lines() if not self.enabled and not quiet else None
        self._remaining: Remaining | None = None

    def stage(self, name: str, total: int, unit: str) -> None:
        """See `Progress.stage`."""
        if self._lines is not None:
            self._lines.stage(name, total, unit)
        if not self.enabled:
            return
        if self._bars is None:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
                TextColumn("{task.fields[detail]}", style="dim", markup=False),
                console=err,
            )
            self._bars.start()
        self._finish_task()
        if self._remaining is not None:
            self._remaining.stage(name, total)
        self._task = self._bars.add_task(name, total=total or None, unit=unit, detail="", left=self._left())

    def advance(self, count: int, detail: str = "") -> None:
        """See `Progress.advance`."""
        if self._lines is not None:
            self._lines.advance(count)
        if self._remaining is not None:
            self._remaining.advance(count)
        if self._bars is not None:
            self._bars.update(self._task, advance=count, detail=visible(detail), left=self._left())

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        if not self.quiet:
            err.print(text, highlight=False)

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        """See `Progress.expect`."""
        self._remaining = Remaining(stages) if self.enabled else None

    def _left(self) -> str:
        """The time that all stages together will still take, for people."""
        seconds = self._remaining.seconds() if self._remaining is not None else 0.0
        return f"about {duration_text(seconds)} left in all" if seconds >= 1.0 else ""

    def _finish_task(self) -> None:
        if self._bars is not None and self._task is not None:
            task = next(task for task in self._bars.tasks if task.id == self._task)
            self._bars.update(self._task, completed=task.total or task.completed, total=task.total or 1, detail="", left="")

    def __enter__(self) -> "ConsoleProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._finish_task()
            self._bars.stop()
            self._bars = None


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
