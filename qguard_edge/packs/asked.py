"""The rounds of a check: the candidate is asked, the base's answers are those of the pack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qguard_edge.packs.pack import Pack, PackSuite
from qguard_edge.progress import Progress
from qguard_edge.verify.checks import Errors, Margins
from qguard_edge.verify.rounds import SuiteRun, round_ends
from qguard_edge.verify.suites.base import Reply, SuitePrompt

Ask = Callable[[PackSuite, Sequence[int]], list[Reply | None]]
"""Answers to prompts of a suite, by their place in the pack; None: the prompt could not be sent."""


@dataclass
class Asked:
    """The rounds, done.

    Attributes:
        runs: the suites with their checks; none when nothing was asked.
        skipped: prompts per suite that could not be sent.
        ended: why no more was asked.
    """

    runs: list[SuiteRun] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    ended: str = "every check is decided"


def ask_in_rounds(pack: Pack, limit: int | None, margins: Margins, keep_going: bool, ask: Ask, progress: Progress) -> Asked:
    """Ask until every check is decided or the pack has no more prompts.

    Args:
        pack: prompts and the base's answers.
        limit: prompts per suite at most; None: all.
        margins: that are still no worse.
        keep_going: ask on when a check has failed.
        ask: the candidate.
        progress: told about each round.
    """
    suites = [packed.suite() for packed in pack.suites]
    if not suites:
        return Asked(ended="the pack has no suite")
    most = limit if limit is not None else max(len(suite.prompts) for suite in suites)
    done = Asked([SuiteRun(suite, 1, 0, most, ("base", "candidate")) for suite in suites])
    done.skipped = {suite.name: 0 for suite in suites}
    errors = Errors.of(suites)
    for number, end in enumerate(round_ends(most), 1):
        active = [(run, packed) for run, packed in zip(done.runs, pack.suites, strict=True) if not run.finished]
        upcoming = [run.upcoming(run.reached, end) for run, _ in active]
        progress.stage(f"Round {number}, the candidate", sum(map(len, upcoming)), "answers")
        for (run, packed), prompts in zip(active, upcoming, strict=True):
            done.skipped[packed.name] += _take(run, packed, prompts, ask)
            run.reached += len(prompts)
            run.look(margins, errors)
        if not keep_going and any(run.failed for run in done.runs):
            done.ended = "a check fails, so nothing more was asked (--keep-going asks on)"
            return done
    if any(run.open_checks for run in done.runs):
        done.ended = "the pack has no more prompts, or --max-prompts allows no more"
    return done


def _take(run: SuiteRun, packed: PackSuite, prompts: Sequence[SuitePrompt], ask: Ask) -> int:
    """Ask the next prompts of a suite; how many could not be sent."""
    places = {prompt.id: i for i, prompt in enumerate(packed.prompts)}
    replies = ask(packed, [places[prompt.id] for prompt in prompts])
    sent = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply is not None]
    recorded = [packed.prompts[places[prompt.id]] for prompt, _ in sent]
    base = [Reply(one.answer, one.ended) for one in recorded]
    run.take([prompt for prompt, _ in sent], {"candidate": [reply for _, reply in sent], "base": base})
    return len(prompts) - len(sent)
