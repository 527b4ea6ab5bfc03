"""Drives the rounds: opens the files, asks each its share of a round, and stops when nothing more is to be learned.

All files stay open between rounds; the drift has had them open together before, and only the caches of the sequences are
new. As many of them answer at once as the engine says (`Engine.at_once`): each model has its share of the cores to itself, so
that no threads of one model wait for each other at every product. Two models on the *same* cores would slow each other down many
times over.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qguard_edge.progress import Progress
from qguard_edge.runtimes.batching import Answer
from qguard_edge.verify.asking import Asker, AskSettings, Contexts, SuiteQuestions, contexts_of, questions_of, replies_of
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
        self.at_once = min(how.at_once, len(self.askers))
        self.cost: dict[str, dict[str, float]] = {run.suite.name: {} for run in runs}
        """Seconds per prompt of each suite and file."""
        self.contexts: Contexts = {}
        self._telling = threading.Lock()

    def run(self, margins: Margins, errors: Errors) -> str:
        """Ask until the end; why it ended, in one sentence."""
        with ExitStack() as stack:
            # One pool for all rounds: a model's process ends with the thread that started it (`die_with_parent`).
            pool = stack.enter_context(ThreadPoolExecutor(self.at_once))
            for asker in self.askers.values():
                stack.enter_context(closing(asker))
            for number, end in enumerate(round_ends(self.budget.prompts), 1):
                active = [run for run in self.runs if not run.finished]
                if not active:
                    break
                if number > 1 and self._seconds(active, end) > self.budget.left():
                    return "the time of --max-time is spent"
                self._round(number, active, end, pool)
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

    def _round(self, number: int, active: Sequence[SuiteRun], end: int, pool: ThreadPoolExecutor) -> None:
        """The next prompts of some suites, to every file."""
        parts = {run.suite.name: self._prepare(run, end) for run in active}
        answers = self._answers(number, parts, pool)
        with self.files.base.vocabulary() as vocabulary:
            replies: dict[str, dict[str, tuple[Reply, ...]]]
            replies = {role: replies_of(found, vocabulary) for role, found in answers.items()}
        for run in active:
            start, stop = parts[run.suite.name]
            prompts = self.questions[run.suite.name].suite.prompts[start:stop]
            run.take(prompts, {role: found[run.suite.name] for role, found in replies.items()})
            run.reached = stop

    def _answers(
        self, number: int, parts: Mapping[str, tuple[int, int]], pool: ThreadPoolExecutor
    ) -> dict[str, dict[str, tuple[Answer, ...]]]:
        """Every file's answers to its parts of the suites, per role and suite."""
        total = sum(stop - start for start, stop in parts.values()) * self.how.samples
        if self.at_once == 1:
            found = {}
            for role in self.askers:
                self.progress.stage(f"Round {number}, the {role}", total, "answers")
                found[role] = self._answers_of(role, number, parts)
            return found
        self.progress.stage(f"Round {number}", total * len(self.askers), "answers")
        running = {role: pool.submit(self._answers_of, role, number, parts) for role in self.askers}
        try:
            return {role: future.result() for role, future in running.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for asker in self.askers.values():  # ends their processes, and with them what the other threads wait for
                asker.close()
            raise

    def _answers_of(self, role: str, number: int, parts: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Answer, ...]]:
        """One file's answers. Called in a thread of its own, so it touches nothing of the other files."""
        found = {}
        for name, (start, stop) in parts.items():
            began, told = time.perf_counter(), partial(self._tell, f"{name}, the {role}")
            found[name] = self.askers[role].ask(self.questions[name], start, stop, self.contexts, told)
            self.cost[name][role] = (time.perf_counter() - began) / max(stop - start, 1)
        if number == 1 and role == "base":
            with self._telling:
                self._forecast()
        return found

    def _tell(self, doing: str, answers: int) -> None:
        with self._telling:
            self.progress.advance(answers, doing)

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
        self.contexts = contexts_of(list(self.questions.values()))
        return start, min(end, len(self.questions[name].ids))

    # Time -------------------------------------------------------------------------------------------------------------

    def _seconds(self, active: Sequence[SuiteRun], end: int) -> float:
        """How long the next round will take."""
        wanted = {run.suite.name: end - len(run.prompts) for run in active}
        per_file = [sum(self.cost[name].get(role, 0.0) * n for name, n in wanted.items()) for role in self.askers]
        return max(*per_file, sum(per_file) / self.at_once)

    def _forecast(self) -> None:
        """Say how long it may take, from what the base's first answers took."""
        costs = [(run, self.cost[run.suite.name]["base"] * len(self.askers) / self.at_once) for run in self.runs]
        if sum(cost for _, cost in costs) / len(self.askers) * FORECAST_FROM < 1:
            return  # kept answers, or a tiny model
        usual = sum(cost * min(USUAL, run.most) for run, cost in costs)
        most = sum(cost * run.most for run, cost in costs)
        limit = f", or until {self.budget.seconds / 60:.0f} min are spent (--max-time)" if self.budget.seconds else ""
        self.progress.note(
            f"{_about(usual)} if {min(USUAL, self.budget.prompts)} prompts of each suite decide, "
            f"at most {_about(most)} ({self.budget.prompts} prompts, --max-prompts){limit}"
        )


def _about(seconds: float) -> str:
    """A forecast in words."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else "a minute"
