"""The options that write reports, for every command that has a `Verification`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qguard_edge.verify.results import Verification

PANEL = "Reports"

Junit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="JUnit XML: one test case per check.", rich_help_panel=PANEL)
]
Sarif = Annotated[
    Path | None, typer.Option("--sarif", metavar="FILE", help="SARIF 2.1.0 for code scanning.", rich_help_panel=PANEL)
]
Markdown = Annotated[
    Path | None,
    typer.Option("--markdown", metavar="FILE", help="Markdown, as for a pull request.", rich_help_panel=PANEL),
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="One self-contained HTML page.", rich_help_panel=PANEL)
]


def write_reports(
    outcome: "Verification",
    *,
    junit: Path | None = None,
    sarif: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
) -> None:
    """Write the reports that were given a file; Markdown also goes to the job summary of a GitHub action.

    Raises:
        OutputError: a file cannot be written.
    """
    from convert.atomic import atomic_path
    from qguard_edge.report.html import to_html
    from qguard_edge.report.junit import to_junit
    from qguard_edge.report.markdown import append_summary, to_markdown
    from qguard_edge.report.sarif import to_sarif

    for path, make in ((junit, to_junit), (sarif, to_sarif), (markdown, to_markdown), (html, to_html)):
        if path is not None:
            with atomic_path(path) as temporary:
                temporary.write_text(make(outcome), encoding="utf-8")
    append_summary(to_markdown(outcome))
