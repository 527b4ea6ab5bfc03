"""Drives the rounds: opens the files, asks each its share of a round, and stops when nothing more is to be learned.

All files stay open between rounds; the drift has had them open together before, and only the caches of the sequences are
new. They answer one after the other, never at once: two models on the same cores slow each other down many times over.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from qguard_edge.progress import Progress
from qguard_edge.runtimes.batching import Answer
from qguard_edge.verify.asking import Asker, AskSettings, SuiteQuestions, context_of, questions_of, replies_of
from qguard_edge.verify.chat import ChatTemplate
from qguard_edge.verify.checks import Errors, Margins
from qguard_edge.verify.keep import WorkFolder
from qguard_edge.verify.results import Verdict
from qguard_edge.verify.rounds import SuiteRun, round_ends
from qguard_edge.verify.subjects import Subject
from qguard_edge.verify.suites.base import Reply

PREPARED = 512
"""Prompts of a suite that are turned into token ids at a time."""
USUAL = 304
"""Prompts of a suite after which honest files are mostly decided; for the forecast."""
FORECAST_FROM = 100
"""A forecast is made if this many prompts of each suite take a second or more."""


@dataclass(frozen=True)
class Budget:
    """When a run ends although something is undecided.

    Attributes:
        prompts: of each suite at most.
        seconds: for everything; None: no limit.
        keep_going: ask on when a check has failed.
        started: `time.perf_counter()` at the start of the run.
    """

    prompts: int
    seconds: float | None
    keep_going: bool
    started: float

    def left(self) -> float:
        """Seconds that are left."""
        return float("inf") if self.seconds is None else self.seconds - (time.perf_counter() - self.started)


@dataclass(frozen=True)
class Files:
    """What is asked.

    Attributes:
        base: has the template and the vocabulary.
        paths: per role, the base among them.
        hashes: per role, see `Engine.identity`.
        template: of the base; None: prompts are used as they are.
    """

    base: Subject
    paths: Mapping[str, Path]
    hashes: Mapping[str, str]
    template: ChatTemplate | None


class Loop:
    """The rounds of one run.

    Args:
        files: to ask.
        runs: the suites.
        how: the models are run.
        work: where answers are kept.
        budget: prompts and time.
        progress: told about each round.
    """

    def __init__(
        self, files: Files, runs: Sequence[SuiteRun], how: AskSettings, work: WorkFolder, budget: Budget, progress: Progress
    ) -> None:
        self.files, self.runs, self.how, self.budget, self.progress = files, runs, how, budget, progress
        self.askers = {role: Asker(path, files.hashes[role], role, how, work) for role, path in files.paths.items()}
        self.questions: dict[str, SuiteQuestions] = {}
        self.cost: dict[str, float] = {}
        """Seconds per prompt of each suite, all files together."""
        self.n_ctx = 0

    def run(self, margins: Margins, errors: Errors) -> str:
        """Ask until the end; why it ended, in one sentence."""
        with ExitStack() as stack:
            for asker in self.askers.values():
                stack.enter_context(closing(asker))
            for number, end in enumerate(round_ends(self.budget.prompts), 1):
                active = [run for run in self.runs if not run.finished]
                if not active:
                    break
                if number > 1 and self._seconds(active, end) > self.budget.left():
                    return "the time of --max-time is spent"
                self._round(number, active, end)
                with_look = self._look(active, margins, errors)
                if with_look is not None and not self.budget.keep_going:
                    return f"{with_look} fails, so nothing more was asked (--keep-going asks on)"
        return self._why()

    def _why(self) -> str:
        open_checks = [
            found.check.id for run in self.runs for found in run.found if found.check.verdict is Verdict.INCONCLUSIVE
        ]
        if not open_checks:
            return "every check is decided"
        if any(run.open_checks and len(run.prompts) >= run.most for run in self.runs):
            return f"{self.budget.prompts} prompts of a suite were asked, as many as --max-prompts allows"
        if any(run.open_checks for run in self.runs):
            return "the suite has no more prompts"
        return f"{self.budget.prompts} prompts (--max-prompts) would hardly decide what is open, so it was given up"

    def _look(self, active: Sequence[SuiteRun], margins: Margins, errors: Errors) -> str | None:
        """A look at the checks of the suites that were asked; one that fails."""
        self.progress.stage("Judging the answers", len(active), "suites")
        for run in active:
            run.look(margins, errors)
            self.progress.advance(1, run.suite.name)
        failed = (found.check.id for run in active for found in run.found if found.check.verdict is Verdict.FAIL)
        return next(failed, None)

    def _round(self, number: int, active: Sequence[SuiteRun], end: int) -> None:
        """The next prompts of some suites, to every file."""
        parts = {run.suite.name: self._prepare(run, end) for run in active}
        answers: dict[str, dict[str, tuple[Answer, ...]]] = {}
        for role, asker in self.askers.items():
            total = sum(stop - start for start, stop in parts.values()) * self.how.samples
            self.progress.stage(f"Round {number}, the {role}", total, "answers")
            answers[role] = {}
            for run in active:
                began, given = time.perf_counter(), list[Answer]()
                start, stop = parts[run.suite.name]
                for piece in asker.ask(self.questions[run.suite.name], start, stop, self.n_ctx):
                    given += piece
                    self.progress.advance(len(piece), run.suite.name)
                answers[role][run.suite.name] = tuple(given)
                self._spent(run.suite.name, (time.perf_counter() - began) / max(stop - start, 1), role)
            if number == 1 and role == "base":
                self._forecast()
        with self.files.base.vocabulary() as vocabulary:
            replies: dict[str, dict[str, tuple[Reply, ...]]]
            replies = {role: replies_of(found, vocabulary) for role, found in answers.items()}
        for run in active:
            start, stop = parts[run.suite.name]
            prompts = self.questions[run.suite.name].suite.prompts[start:stop]
            run.take(prompts, {role: found[run.suite.name] for role, found in replies.items()})
            run.reached = stop

    def _prepare(self, run: SuiteRun, end: int) -> tuple[int, int]:
        """Which prompts of a suite come next; turns them into token ids where that has not been done."""
        name, start = run.suite.name, len(run.prompts)
        known = self.questions.get(name)
        ready = len(known.ids) if known else 0
        if ready < min(end, run.most):
            upcoming = run.upcoming(ready, max(end, ready + PREPARED))
            if upcoming or known is None:
                (added,) = questions_of(self.files.base, [replace(run.suite, prompts=upcoming)], self.files.template)
                suite = replace(run.suite, prompts=(*(known.suite.prompts if known else ()), *upcoming))
                self.questions[name] = SuiteQuestions(suite, (*(known.ids if known else ()), *added.ids))
        self.n_ctx = max(self.n_ctx, context_of(list(self.questions.values())))
        return start, min(end, len(self.questions[name].ids))

    # Time -------------------------------------------------------------------------------------------------------------

    def _spent(self, name: str, seconds: float, role: str) -> None:
        before = self.cost.get(name, 0.0)
        self.cost[name] = seconds if role == "base" else before + seconds

    def _seconds(self, active: Sequence[SuiteRun], end: int) -> float:
        return sum(self.cost[run.suite.name] * (end - len(run.prompts)) for run in active)

    def _forecast(self) -> None:
        """Say how long it may take, from what the base's first answers took."""
        files = len(self.askers)
        if sum(self.cost.values()) * FORECAST_FROM < 1:
            return  # kept answers, or a tiny model
        usual = sum(cost * files * min(USUAL, run.most) for run, cost in self._costs())
        most = sum(cost * files * run.most for run, cost in self._costs())
        limit = f", or until {self.budget.seconds / 60:.0f} min are spent (--max-time)" if self.budget.seconds else ""
        self.progress.note(
            f"about {usual / 60:.0f} min if {min(USUAL, self.budget.prompts)} prompts of each suite decide, "
            f"at most {most / 60:.0f} min ({self.budget.prompts} prompts, --max-prompts){limit}"
        )

    def _costs(self) -> list[tuple[SuiteRun, float]]:
        return [(run, self.cost[run.suite.name]) for run in self.runs if run.suite.name in self.cost]
