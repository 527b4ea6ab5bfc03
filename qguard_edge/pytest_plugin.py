"""pytest plugin: `pytest --qguard-candidate model.gguf --qguard-baseline pack.json` gives one test per check.

Options (also as ini values and environment, for CI):

    --qguard-candidate FILE   the GGUF to check        qguard_candidate   QGUARD_CANDIDATE
    --qguard-server URL       or a running server      qguard_server      QGUARD_SERVER
    --qguard-baseline PACK    the baseline pack        qguard_baseline    QGUARD_BASELINE
    --qguard-limit N          prompts per suite at most

With a candidate and a baseline, tests `qguard::SUITE/NAME` are added: a failing check fails, an inconclusive one is skipped with
its reason, and the last lines say so, for such a run is green.
The candidate is run once, at the first test that needs it. In own tests:

    @pytest.mark.qguard
    def test_my_model(qguard_outcome):
        assert qguard_outcome.check("injection/discovery").verdict == "pass"

Tests with the marker are skipped where no candidate and baseline were given. Nothing heavy is imported before it is needed.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qguard_edge.verify.results import Verification

NAMES = ("candidate", "server", "baseline")
NEEDED = "needs --qguard-candidate (or --qguard-server) and --qguard-baseline"
_outcome = pytest.StashKey[Any]()
_left_out = pytest.StashKey[int]()


class CheckFailedError(Exception):
    """A check that does not pass; its text is what pytest shows."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("qguard", "qguard-edge: check a model against a baseline pack")
    texts = {
        "candidate": ("FILE", "GGUF to check against the baseline pack"),
        "server": ("URL", "running llama-server to check instead of a file"),
        "baseline": ("PACK", "baseline pack written by `qguard-edge baseline`"),
    }
    for name, (metavar, text) in texts.items():
        group.addoption(f"--qguard-{name}", metavar=metavar, default=None, help=text)
        parser.addini(f"qguard_{name}", text, default="")
    group.addoption("--qguard-limit", metavar="N", type=int, default=None, help="prompts per suite, and texts, at most")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "qguard: needs a candidate and a baseline pack (--qguard-candidate, --qguard-baseline)"
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add one test per check, and skip marked tests that have nothing to check."""
    if not _given(config):
        marked = [item for item in items if item.get_closest_marker("qguard")]
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=NEEDED))
        config.stash[_left_out] = len(marked)
        return
    collector = QGuardCollector.from_parent(session, name="qguard", nodeid="qguard")
    items.extend(collector.collect())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what a green run does not show: that checks were left undecided, or that nothing was checked at all."""
    found = config.stash.get(_outcome, None)
    if found is None or isinstance(found, Exception):
        if config.stash.get(_left_out, 0):
            terminalreporter.write_line(f"qguard: {config.stash[_left_out]} tests skipped, nothing was checked: {NEEDED}")
        return
    terminalreporter.write_line(f"qguard: {found.verdict}: {found.summary}. {found.advice}")


class QGuardCollector(pytest.Collector):
    """Where the checks hang in pytest's tree."""

    def collect(self) -> Sequence["QGuardItem"]:
        """One item per check that the pack will make."""
        try:
            names = list(_check_names(_value(self.config, "baseline")))
        except _own_errors() as error:
            raise pytest.UsageError(f"--qguard-baseline: {error}") from error
        return [QGuardItem.from_parent(self, name=name) for name in names]


class QGuardItem(pytest.Item):
    """One check as a test."""

    def runtest(self) -> None:
        """Fail, skip or pass as the check does."""
        outcome = outcome_of(self.config)
        check = outcome.check(self.name)
        if check.verdict == "inconclusive":
            pytest.skip(f"inconclusive: {check.reason}")
        if check.verdict != "pass":
            from qguard_edge.report.text import numbers_of, printable

            numbers = [f"    {name}: {text}" for name, text in numbers_of(check, outcome)]
            raise CheckFailedError(printable("\n".join([f"{check.title}: {check.reason}", *numbers])))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The reason without a traceback."""
        if excinfo.errisinstance((CheckFailedError, *_own_errors())):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the test comes from."""
        return self.path, None, f"qguard::{self.name}"


@pytest.fixture(scope="session")
def qguard_outcome(request: pytest.FixtureRequest) -> "Verification":
    """The outcome of the check; made once per session."""
    if not _given(request.config):
        pytest.skip(NEEDED)
    return outcome_of(request.config)


def outcome_of(config: pytest.Config) -> "Verification":
    """Check the candidate, once per session; a failure is kept as well, so that no test tries again.

    Raises:
        QGuardError: the check could not be made.
    """
    if _outcome not in config.stash:
        from qguard_edge.packs.check import CheckRequest, check
        from qguard_edge.packs.pack import read_pack
        from qguard_edge.verify.files import text_facts

        pack, candidate = Path(_value(config, "baseline")), _value(config, "candidate")
        try:
            request = CheckRequest(
                pack=read_pack(pack),
                source=text_facts("suite", pack),
                candidate=Path(candidate) if candidate else None,
                server=_value(config, "server") or None,
                limit=config.getoption("--qguard-limit"),
                threads=int(os.environ.get("QGUARD_THREADS") or 0),
            )
            config.stash[_outcome] = check(request)
        except _own_errors() as error:
            config.stash[_outcome] = error
    found = config.stash[_outcome]
    if isinstance(found, Exception):
        raise found
    return found  # type: ignore[no-any-return]


def _check_names(baseline: str) -> Iterator[str]:
    from qguard_edge.packs.pack import read_pack

    for packed in read_pack(Path(baseline)).suites:
        suite = packed.suite()
        if suite.discovery:
            yield f"{suite.name}/discovery"
        yield from (f"{suite.name}/{matcher.name}" for matcher in suite.matchers)
    yield "drift/mean-kl"


def _value(config: pytest.Config, name: str) -> str:
    given = (
        config.getoption(f"--qguard-{name}") or os.environ.get(f"QGUARD_{name.upper()}") or config.getini(f"qguard_{name}")
    )
    return str(given or "")


def _given(config: pytest.Config) -> bool:
    """Whether there is something to check.

    Raises:
        pytest.UsageError: only half of what is needed was given.
    """
    candidate, server, baseline = (_value(config, name) for name in NAMES)
    if candidate and server:
        raise pytest.UsageError("give --qguard-candidate or --qguard-server, not both")
    if bool(candidate or server) != bool(baseline):
        raise pytest.UsageError("--qguard-baseline and one of --qguard-candidate and --qguard-server belong together")
    return bool(baseline)


def _own_errors() -> tuple[type[Exception], ...]:
    from quant_grids.errors import QGuardError

    return (QGuardError,)
