"""Suites by name, from files, or as values."""

from collections.abc import Iterable
from pathlib import Path

from qguard_edge.verify.suites.base import Suite
from qguard_edge.verify.suites.files import read_suite
from qguard_edge.verify.verifier import select_suites

SuiteChoice = str | Iterable[str | Suite]
"""Names of built-in suites, separated by commas or one by one, and suites that are values already."""


def choose_suites(
    names: SuiteChoice = "default", *, files: Iterable[str | Path] = (), phrases: Iterable[str] = ()
) -> tuple[Suite, ...]:
    """Suites to ask: built-in ones by name, the given ones and those of files after them.

    Args:
        names: `injection`, `refusal`, `code` (these three: `default`), `tools`, `long`, `languages`; `all`
            for every one; `drift`, which is always measured, for none.
        files: suites of one's own, .yaml or .jsonl.
        phrases: to look for in the answers too, in `injection` if it is asked, else in every suite.

    Raises:
        SuiteError: an unknown name, a file that is no suite, or phrases without a suite to look in.
    """
    given = names.split(",") if isinstance(names, str) else list(names)
    wanted = [name.strip() for name in given if isinstance(name, str) and name.strip()]
    suites = [suite for suite in given if not isinstance(suite, str)]
    return select_suites(wanted, [*suites, *(read_suite(Path(path)) for path in files)], tuple(phrases))
