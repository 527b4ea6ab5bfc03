"""What a verdict means for the one who has to decide: a summary, and one line of advice."""

from collections.abc import Sequence

from qguard_edge.verify.results import Check, CheckKind, Verdict


def summarise_checks(checks: Sequence[Check]) -> str:
    """One sentence: how many checks have which verdict, and which failed."""
    failed = [check.id for check in checks if check.verdict is Verdict.FAIL]
    undecided = [check.id for check in checks if check.verdict is Verdict.INCONCLUSIVE]
    if failed:
        return f"{len(failed)} of {len(checks)} checks fail: {', '.join(failed)}"
    if undecided:
        return f"no check fails, {len(undecided)} of {len(checks)} are inconclusive: {', '.join(undecided)}"
    return f"all {len(checks)} checks pass: the file behaves like its base on what was asked"


def advice_on(checks: Sequence[Check], *, pack: bool = False) -> str:
    """One sentence: ship, do not ship and why, or ask for more prompts.

    Args:
        checks: all of the run.
        pack: the base's answers come from a baseline pack, which cannot be asked for more.
    """
    failed = [check for check in checks if check.verdict is Verdict.FAIL]
    if any(check.kind is CheckKind.DRIFT for check in failed):
        return "Do not ship: broken weights, or not a version of this base (drift); convert it again from the base."
    phrases = [finding for check in failed for finding in check.findings[:1] if check.name == "discovery"]
    if phrases:
        new = phrases[0]
        base = f"in {new.base} of the base's" if new.base else "in none of the base's"
        often = f"in {new.candidate} of {new.n} answers, {base}"
        return f"Do not ship: {new.phrase!r} stands {often}; read the answers in the report."
    security = [check for check in failed if check.kind is CheckKind.SECURITY]
    if security:
        return f"Do not ship: {security[0].title.lower()} ({security[0].id}) increased; read the answers in the report."
    if failed:
        return f"Do not ship: the file is worse than its base ({failed[0].id}); try a larger type."
    undecided = [check for check in checks if check.verdict is Verdict.INCONCLUSIVE]
    if not undecided:
        return "Ship it: on what was asked it behaves like its base."
    if prompts := prompts_to_ask(checks):
        if pack:
            return f"Not decided: record a pack with more prompts (baseline --max-prompts {prompts}), or use verify."
        return f"Not decided: ask for more prompts (--max-prompts {prompts})."
    if all(check.kind is CheckKind.DRIFT for check in undecided):
        return "Not decided: measure the drift on more texts (--text)."
    open_ids = ", ".join(check.id for check in undecided)
    return f"Not decided: more prompts would hardly help with {open_ids}; read the answers, or state the margin you accept."


def prompts_to_ask(checks: Sequence[Check]) -> int | None:
    """Prompts of each suite that would decide what is undecided; None: more prompts would not."""
    wanted = [
        check.prompts_needed
        for check in checks
        if check.verdict is Verdict.INCONCLUSIVE and check.kind is not CheckKind.DRIFT and check.prompts_needed
    ]
    return -(-max(wanted) * 5 // 4 // 50) * 50 if wanted else None
