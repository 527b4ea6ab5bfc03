"""AutoRound beside plain rounding and quantguard: same model, type, text, samples and steps; fidelity, ASR, time and memory.

Run: python -m venv VENV && VENV/bin/pip install auto-round sentencepiece gguf
     python scripts/studies/compare_autoround.py --python VENV/bin/python --study smollm2 --to q4_0 --out docs/quantguard
     python scripts/studies/compare_autoround.py --python VENV/bin/python --study uniform:q4_0 --out docs/quantguard

`auto-round` needs versions of transformers that differ from ours, so it runs in an interpreter of its own. Its GGUF export
tunes scales as well as codes and chooses the types of embedding and output matrix itself; the file sizes stand beside the
figures. Times are CPU seconds of the whole process, loading included: wall time on a shared machine says little.
`--only autoround` leaves out the rows that scripts/studies/study_quantguard.py has measured already.
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from quantguard_arms import Setting
from study_quantguard import Study, studies

from convert.cores import available_cores
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from qguard_edge.defenses.options import NoneOptions, QuantGuardOptions
from qguard_edge.lab.evaluation import compare
from qguard_edge.learned.calibration import CalibrationOptions, load_calibration
from qguard_edge.runtimes.hf import load_hf_model


class AutoRoundError(RuntimeError):
    """The other tool did not write a file; carries the end of what it said."""


def texts_of(study: Study, model: str, samples: int, seqlen: int, out: Path) -> Path:
    """The very texts that quantguard gets at seed 0, joined to rows that are long enough: AutoRound drops shorter ones."""
    loaded = load_hf_model(study.folders[model])
    options = CalibrationOptions(study.texts["matching"], samples, study.seqlen)
    calibration = load_calibration(options, loaded, "", 0)
    flat, length = [token for ids in calibration.samples for token in ids], seqlen + 8  # a few for changed token borders
    rows = [flat[start : start + length] for start in range(0, len(flat) - length + 1, length)]
    lines = [json.dumps({"text": loaded.tokenizer.decode(row)}) for row in rows]
    out.write_text("\n".join(lines) + "\n")
    return out


def run_autoround(arguments: argparse.Namespace, study: Study, model: str, text: Path, out: Path) -> Path:
    """The file that AutoRound writes."""
    told = {
        "model": str(study.folders[model]),
        "out": str(out),
        "text": str(text),
        "to": parse_file_type(study.to).name.lower(),
        "steps": arguments.steps,
        "samples": arguments.samples,
        "seqlen": arguments.seqlen,
        "batch": 8,
        "threads": arguments.threads or available_cores(),
        "pre": str(GgufFile(study.work / f"{model}.gguf").value("tokenizer.ggml.pre")),
    }
    worker = Path(__file__).with_name("autoround_worker.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [arguments.python, worker, json.dumps(told)], env=environment, capture_output=True, text=True, check=False
    )
    files = sorted(out.rglob("*.gguf"))
    if done.returncode or not files:
        raise AutoRoundError("\n".join((done.stdout + done.stderr).splitlines()[-25:]))
    return files[0]


def row_of(study: Study, model: str, label: str, path: Path, **cost: Any) -> dict[str, Any]:
    """What a finished file is like."""
    measured, full = study.measure(path), study.full_precision(model)
    found, asr = compare(full.answers, measured.answers), measured.asr
    return {
        "study": study.victim,
        "model": model,
        "label": label,
        "to": study.to,
        "asr": asr.value if asr.n else None,
        "low": asr.low,
        "high": asr.high,
        "n": asr.n,
        "kl": found.mean_kl,
        "kl_unlike": compare(full.prose, measured.prose).mean_kl,
        "kl_999": found.kl_999,
        "same_top": found.same_top,
        "perplexity_ratio": found.perplexity_ratio,
        "bytes": path.stat().st_size,
        **cost,
    }


def rows_of(arguments: argparse.Namespace, study: Study, model: str) -> list[dict[str, Any]]:
    """Every arm on one model."""
    made = []
    wanted = [name.strip() for name in arguments.only.split(",")]
    for label, defense in (("plain", NoneOptions()), ("quantguard", QuantGuardOptions(steps=arguments.steps))):
        if label in wanted:
            started = time.process_time()
            study.row(model, Setting(label, defense, samples=arguments.samples))
            made.append(row_of(study, model, label, study.work / "out.gguf", cpu_seconds=time.process_time() - started))
    if "autoround" in wanted:
        text = texts_of(study, model, arguments.samples, arguments.seqlen, study.work / "autoround.jsonl")
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        path = run_autoround(arguments, study, model, text, study.work / "autoround")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        wall, peak = time.monotonic() - started, after.ru_maxrss / 2**20
        made.append(row_of(study, model, "autoround", path, cpu_seconds=cpu, wall_seconds=wall, peak_gib=peak))
    return made


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of the environment that has auto-round")
    parser.add_argument("--study", default="smollm2", help="smollm2, or a victim such as uniform:q4_0")
    parser.add_argument("--to", default="q4_0", help="type, for smollm2")
    parser.add_argument("--models", default="clean", help="of a victim: attacked, clean or both")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128, help="AutoRound's rows; the texts are joined")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", default="plain,quantguard,autoround")
    parser.add_argument("--out", type=Path, help="folder for autoround.json")
    arguments = parser.parse_args()
    arguments.part, arguments.victim = "smollm2" if arguments.study == "smollm2" else "victims", "tiny"
    arguments.types, arguments.victims, arguments.scenario = arguments.to, arguments.study, "injection"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for study in studies(arguments, Path(folder)):
            for model in study.folders:
                if model in arguments.models.split(","):
                    rows += rows_of(arguments, study, model)
    document: dict[str, Any] = {"rows": []}
    path = arguments.out / "autoround.json" if arguments.out else None
    if path and path.is_file():
        document = json.loads(path.read_text())
    settings = {name: getattr(arguments, name) for name in ("samples", "seqlen", "steps", "threads")}
    document["rows"] += [row | settings for row in rows]
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        asr = f"ASR {row['asr']:.2f} ({row['low']:.2f}-{row['high']:.2f}, n = {row['n']}), " if row["n"] else ""
        print(f"{row['study']} {row['model']} {row['label']}: {asr}KL {row['kl']:.4f}, {row['cpu_seconds']:.0f} CPU s")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
