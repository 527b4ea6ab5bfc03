"""How often does `verify` fail a file that has nothing wrong with it?

    python scripts/studies/study_false_alarms.py [MODEL] [--types q4_0,q4_k] [--seeds 0,1,2] [--defense ortho] [--limit N]
        [--work DIR]

MODEL is a clean full-precision folder or GGUF; without one it is the lab's clean tiny model. For every type its plain
quantization and one hardened file per seed are compared with it over the built-in suites, all prompts, greedily. Every check that
*fails* is a false alarm. Inconclusive ones are counted beside: no alarm, but no answer either.

The checks of one model share their prompts and the checks of one file their answers, so they are not independent: the Wilson
interval that is printed is too narrow where an alarm of one file makes one of another likelier. Finished answers stay in
`--work`; a second call goes on from them. The last line of the output is one JSON object.
"""

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import NoneOptions, options_class
from qguard_edge.lab.presets import preset_of
from qguard_edge.lab.runner import LabSettings
from qguard_edge.lab.victims import clean_folder, corpus_of
from qguard_edge.progress import NoProgress
from qguard_edge.verify.results import Verdict
from qguard_edge.verify.statistics import wilson
from qguard_edge.verify.verifier import VerifyRequest, select_suites, verify

Found = dict[str, dict[str, str]]
"""File -> check -> verdict."""


def base_of(model: str | None, work: Path) -> Path:
    """The clean model as a GGUF in full precision."""
    if model and model.endswith(".gguf"):
        return Path(model)
    if model is None:
        settings = LabSettings()
        corpus = corpus_of(None, settings.seed)
        folder = clean_folder("tiny", corpus, preset_of("tiny"), settings.seed, "generated", NoProgress())
    else:
        folder = Path(model)
    base = work / "base.gguf"
    if not base.is_file():
        write_base_gguf(folder, base)
    return base


def files_of(base: Path, kind: str, defense: str, seeds: list[int], work: Path) -> dict[str, Path]:
    """The plain file of a type and its hardened ones, by label."""
    wanted = {f"{kind} none": (NoneOptions(), 0), **{f"{kind} {defense} {s}": (options_class(defense)(), s) for s in seeds}}
    made = {}
    for label, (options, seed) in wanted.items():
        made[label] = work / f"{label.replace(' ', '-')}.gguf"
        if not made[label].is_file():
            quantize = QuantizeOptions(parse_file_type(kind))
            convert_model(
                GgufRequest(
                    model=str(base),
                    options=quantize,
                    defense=options,
                    outfile=str(made[label]),
                    seed=seed,
                    device="cpu",
                    check_loads=False,
                )
            )
    return made


def verdicts(base: Path, files: dict[str, Path], limit: int | None, work: Path) -> Found:
    """What every check says about every file."""
    suites = select_suites(["all"])
    asked = VerifyRequest(base, base, suites=suites, limit=limit, work=work / "pieces")
    found: Found = {}
    for label, path in files.items():
        outcome = verify(replace(asked, candidate=path))
        found[label] = {check.id: check.verdict.value for check in outcome.checks}
        alarms = [check for check in outcome.checks if check.verdict is Verdict.FAIL]
        print(f"{label}: {Counter(found[label].values())}", flush=True)
        for check in alarms:
            print(f"  false alarm: {check.id}: {check.reason}", flush=True)
    return found


def summary(found: Found) -> str:
    """A Markdown table: a row per check, a row for all."""
    checks = list(dict.fromkeys(name for file in found.values() for name in file))
    lines = ["| check | files | pass | inconclusive | false alarms |", "|---|---|---|---|---|"]
    rows = {name: Counter(file[name] for file in found.values()) for name in checks}
    for name, counts in {**rows, "**all**": sum(rows.values(), Counter())}.items():
        n, alarms = counts.total(), counts["fail"]
        low, high = wilson(alarms, n)
        share = f"{alarms} ({100 * low:.1f}% to {100 * high:.1f}%)"
        lines.append(f"| {name} | {n} | {counts['pass']} | {counts['inconclusive']} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--types", default="q4_0,q4_k")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--defense", default="ortho")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    base = base_of(args.model, work)
    found: Found = {}
    for kind in args.types.split(","):
        files = files_of(base, kind, args.defense, [int(seed) for seed in args.seeds.split(",")], work)
        found |= verdicts(base, files, args.limit, work)
    print(summary(found))
    print(json.dumps({"model": Path(args.model).name if args.model else "tiny", "limit": args.limit, "verdicts": found}))


if __name__ == "__main__":
    main()
