"""Every family that the built-in table lacks, end to end: a tiny random model through the installed converter and every defense.

Run: qguard-edge converter install
     python scripts/studies/study_families.py --work FOLDER [--only NAME,NAME] [--write]

Per family: transformers' model -> F32 base -> q4_k by none, ortho and feedback. The base's logits are compared with those of
transformers on one prompt; every hardened file is loaded and decodes in llama.cpp; the share of protected weights is counted.
Each family runs in a process of its own; FOLDER/families.jsonl keeps what is done, and a run goes on behind it. `--write` puts
the table into docs/architectures.md; test_families.py (slow) runs this script and holds the table to what it finds.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for what the toys share with the tests

from family_toys import TOYS, VOCABULARY, Toy, save_toy

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
DEFENSES = ("none", "ortho", "feedback")
SECONDS = 300
CLOSE = 1e-2


def run_one(toy: Toy, work: Path) -> dict[str, Any]:
    """One family; a step that fails ends it, with the reason."""
    import torch

    from convert.gguf_file import GgufModel
    from qguard_edge import convert, parse_defense, request_for
    from qguard_edge.runtimes.llama_native import NativeModel
    from tests.helpers.hf_models import PROMPTS, reference_logits, relative_error

    torch.set_num_threads(1)
    row: dict[str, Any] = {"family": toy.family, "architecture": toy.architecture, "step": "model"}
    folder, base = work / "model", work / "base.gguf"
    (work / "text.txt").write_text("\n\n".join(PROMPTS * 20))
    try:
        model = save_toy(toy, folder)
        row["step"] = "converter"
        convert(request_for(str(folder), "f32", outfile=str(base), overwrite=True, threads=1, check_loads=False))
        row |= {"llama_cpp": GgufModel(base).architecture, "step": "load"}
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, VOCABULARY, (24,), generator=generator).tolist()
        with NativeModel(base, n_ctx=512, n_threads=1, exact=True) as llama:
            row |= {"difference": relative_error(llama.logits(tokens), reference_logits(model, tokens))}
        for name in DEFENSES:
            row["step"] = name
            request = request_for(
                str(base), "q4_k", outfile=str(work / "out.gguf"), overwrite=True, threads=1, device="cpu", seed=1,
                defense=parse_defense(name), calibration=str(work / "text.txt"),
            )  # fmt: skip
            report = convert(request)
            assert report.loaded is not None
            row[name] = {
                "tokens": len(report.loaded.tokens),
                "protected": report.coverage and report.coverage.protected_share,
            }
            if report.activations is not None:
                row["unseen"] = sorted(report.activations.unseen)
        del row["step"]
    except Exception as error:  # a row says so
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def reason_of(error: str) -> str:
    """The telling line of an error, for a table."""
    error = re.sub(r"(?<![\w.])/(?:[\w.-]+/)+", "", error)  # folders of this machine
    lines = re.split(r" / |\|", re.sub(r"\s+", " ", error.replace("<|", "").replace("|>", "")))
    telling = [line for line in lines if re.search(r"error loading model:|[A-Z]\w*Error\b|ERROR:", line)] or lines
    return re.sub(r".*(error loading model|ERROR:[\w-]+): ?", "", telling[-1]).strip()[:200]


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, what works first, in the order of the toys."""
    order = [toy.family for toy in TOYS]
    rows = sorted(rows, key=lambda row: order.index(row["family"]))
    lines = [
        "| family | `architectures` | llama.cpp | largest difference of logits | none, ortho, feedback at q4_k | protected |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.get("difference", 0) > CLOSE:
            row |= {
                "step": "logits",
                "error": f"converts, loads and decodes, but its logits differ by {row['difference']:.1g}",
            }
    good = [row for row in rows if "error" not in row]
    for row in good:
        share = f"{row['feedback']['protected']:.1%}" if row["feedback"]["protected"] is not None else "-"
        names = f"| {row['family']} | `{row['architecture']}` | `{row['llama_cpp']}` "
        lines.append(f"{names}| {row['difference']:.0e} | load and decode | {share} |")
    lines += ["", "| family | `architectures` | stops at | why |", "|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['family']} | `{row['architecture']}` | {row['step']} | {reason_of(row['error'])} |")
    missing = [toy.family for toy in TOYS if toy.family not in {row["family"] for row in rows}]
    untried = f" Not run with the present settings: {', '.join(missing)}." if missing else ""
    return "\n".join([f"{len(good)} of {len(rows)} hold.{untried}", "", *lines])


def main() -> None:
    """Run the families that are not done, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="", help="names of families, or parts of them")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one:
        toy = next(toy for toy in TOYS if toy.family == args.one)
        (args.work / "row.json").write_text(json.dumps(run_one(toy, args.work)))
        return
    kept = args.work / "families.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    done = {row["family"] for row in rows}
    for toy in TOYS:
        if toy.family in done or not any(part in toy.family for part in args.only.split(",")):
            continue
        place = args.work / "one"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        command = [sys.executable, __file__, "--work", str(place), "--one", toy.family]
        row = {"family": toy.family, "architecture": toy.architecture, "step": "process", "error": f"over {SECONDS} s"}
        try:
            environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
            subprocess.run(command, timeout=SECONDS, check=True, env=environment, stderr=subprocess.PIPE, text=True)
            row = json.loads((place / "row.json").read_text())
        except subprocess.CalledProcessError as error:
            asserted = re.findall(r"GGML_ASSERT\(.*\) failed|\w+\.cpp:\d+: .*", error.stderr)
            row["error"] = f"llama.cpp aborts: {asserted[-1]}" if asserted else f"ended with {error.returncode}"
        except subprocess.TimeoutExpired:
            pass
        rows.append(row)
        kept.write_text("".join(json.dumps(one) + "\n" for one in rows))
        print(toy.family, row.get("error", row.get("difference")), flush=True)
    if not args.write:
        return
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
