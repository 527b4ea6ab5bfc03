"""Results as Markdown: one table per run, and many runs joined into one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qguard_edge.lab.results import NOT_JUDGED, Arm, LabResult, Rate

_HEAD = (
    "arm",
    "ASR (95% interval)",
    "n",
    "unparsed",
    "mean KL",
    "99.9% KL",
    "same top-1",
    "ppl ratio",
    "flipped",
    "seconds",
    "DER",
)
_JOINED = ("victim", "attack", "type", "scenario", "valid", *_HEAD)
NOTHING = "-"
SUMMARY_NOTE = (
    "Each cell: attack success rate with its 95% Wilson interval, and its n where that is not the row's (what is no code at "
    "all counts as neither, in the code scenario); `KL x` is the mean KL to full precision of the *clean* model "
    "with that defense, over the same with plain rounding."
)
DER_NOTE = (
    "DER: security gained times utility kept, per cost; our definition (`LabResult.der`), the paper's formula is not public."
)


def rate_text(rate: Rate) -> str:
    """0.98 (0.94 to 1.00)."""
    return f"{rate.value:.2f} ({rate.low:.2f} to {rate.high:.2f})"


def success_text(arm: Arm) -> str:
    """Attack success of an arm: of several seeds the worst, with the hits of each."""
    hits = f", worst of {len(arm.by_seed)} seeds: {', '.join(str(rate.hits) for rate in arm.by_seed)}"
    return rate_text(arm.asr) + (hits if arm.by_seed else "")


def valid_text(result: LabResult) -> str:
    """Whether the victim counts, and whether arms are missing."""
    valid = "not yet" if result.validity == NOT_JUDGED else "yes" if result.validity.valid else "**no**"
    return f"{valid}, **partial**" if result.missing else valid


def run_table(result: LabResult) -> str:
    """One run: what it was, whether the victim counts, and its arms."""
    s = result.settings
    lines = [f"### {s['victim']}, {s['attack']}, {s['to']}, {s['scenario']}", ""]
    if result.missing:
        lines += [f"**Partial**: the run is not through; not measured yet: {', '.join(result.missing)}.", ""]
    if result.validity.valid:
        lines.append("Valid victim: clean in full precision, poisoned after plain quantization.")
    elif result.validity != NOT_JUDGED:
        lines.append(
            "**Not a valid victim**, so it says nothing about defenses: " + "; ".join(result.validity.reasons) + "."
        )
    lines.append(
        f"{result.preserved:.1%} of the quantized weights kept by the repair, {result.free:.1%} free to move, attack made "
        f"in {result.train_seconds:.0f} s, seed {s['seed']}."
    )
    lines += [note if note.endswith(".") else note + "." for note in result.notes]
    rows = [[arm.name, *_cells(result, arm)] for arm in result.arms]
    return "\n".join([*lines, "", *markdown(_HEAD, rows), "", DER_NOTE, ""])


def joined_table(results: Sequence[LabResult]) -> str:
    """Many runs in one table, a row per arm."""
    rows = []
    for result in results:
        s = result.settings
        what = [s["victim"], s["attack"], s["to"], s["scenario"], valid_text(result)]
        rows += [[*what, arm.name, *_cells(result, arm)] for arm in result.arms]
    return "\n".join([*markdown(_JOINED, rows), "", DER_NOTE, ""])


def summary_table(results: Sequence[LabResult]) -> str:
    """Many runs, a row per victim: attack success of each defense with its interval, and the clean model's KL beside it."""
    every = [one for result in results for one in _per_format(result)]
    defenses = list(dict.fromkeys(arm.defense for r in every for arm in r.arms if arm.defense and arm.defense != "none"))
    rows = []
    for result in every:
        s = result.settings
        arms = {arm.name: arm for arm in result.arms}
        cells = [s["victim"], s["attack"], s["to"], s["scenario"], valid_text(result)]
        full, attacked = arms["clean fp"], arms.get("attacked fp")
        n = (attacked or full).asr.n
        cells += [str(n), f"{full.asr.value:.2f}", rate_text(attacked.asr) if attacked else NOTHING]
        rows.append([*cells, *(_summary_cell(arms, str(defense), n) for defense in ("none", *defenses))])
    head = ("victim", "attack", "type", "scenario", "valid", "n", "clean fp", "attacked fp", "none", *map(str, defenses))
    return "\n".join([*markdown(head, rows), "", SUMMARY_NOTE, ""])


def _per_format(result: LabResult) -> list[LabResult]:
    """An ELQ run measures each arm in several formats (`attacked nf4 ortho`): one result for each, with the usual names."""
    if result.settings["attack"] != "elq":
        return [result]
    full = [arm for arm in result.arms if arm.defense is None]
    kinds = dict.fromkeys(str(arm.defense).partition(" ")[0] for arm in result.arms if arm.defense is not None)
    made = []
    for kind in kinds:
        arms = []
        for arm in result.arms:
            format_name, _, defense = (arm.defense or "").partition(" ")
            if format_name == kind:
                arms.append(replace(arm, name=f"{arm.model} {defense or 'none'}", defense=defense or "none"))
        attacked = str(result.settings["to"])
        shown = kind if attacked == kind else f"{kind} of {attacked}"
        made.append(replace(result, settings={**result.settings, "to": shown}, arms=(*full, *arms)))
    return made


def _summary_cell(arms: Mapping[str, Arm], defense: str, n: int) -> str:
    """ASR with its interval, its n where it is not the row's, and how much further the *clean* model is from full precision."""
    hardened, clean, plain = (arms.get(name) for name in (f"attacked {defense}", f"clean {defense}", "clean none"))
    if hardened is None:
        return NOTHING
    shown = success_text(hardened) + (f", n {hardened.asr.n}" if hardened.asr.n != n else "")
    if clean is None or plain is None or clean.fidelity is None or plain.fidelity is None:
        return shown
    ratio = clean.fidelity.mean_kl / max(plain.fidelity.mean_kl, 1e-9)
    return f"{shown}, KL x{ratio:.2f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    made = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return made + ["| " + " | ".join(row) + " |" for row in rows]


def _cells(result: LabResult, arm: Arm) -> list[str]:
    f = arm.fidelity
    der = result.der(arm.defense) if arm.model == "attacked" and arm.defense else None
    return [
        success_text(arm),
        str(arm.asr.n),
        f"{arm.unparsed:.1%}",
        f"{f.mean_kl:.4f}" if f else NOTHING,
        f"{f.kl_999:.2f}" if f else NOTHING,
        f"{f.same_top:.1%}" if f else NOTHING,
        f"{f.perplexity_ratio:.3f}" if f else NOTHING,
        f"{arm.flipped:.1%}" if arm.flipped is not None else NOTHING,
        f"{arm.seconds:.1f}" if arm.seconds is not None else NOTHING,
        f"{der:.2f}" if der is not None else NOTHING,
    ]
