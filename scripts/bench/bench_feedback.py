"""How long `convert` with `feedback` takes beside plain quantization and AutoRound, and how much memory: ratios of one run.

Run: python scripts/bench/bench_feedback.py BASE.gguf [--to q4_k] [--threads 2]
     python scripts/bench/bench_feedback.py BASE.gguf --folder FOLDER --autoround VENV/bin/python

The command runs in a process of its own, with all its stages; plain is `llama_model_quantize` alone, without the start of its
child. AutoRound needs an interpreter of its own (see scripts/studies/compare_autoround.py) and the model as a folder; it gets the
same text, its 60 iterations and as many threads. Goals: 12 times plain, a third of AutoRound, 1.5 GiB beyond the mapped base.
The processor's time stands beside the clock's: on a machine that does other things too, that ratio is the one to read, best
with one thread (waiting threads of llama.cpp use the processor as well).
Prints a table and, as the last line, one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tree_memory import TreeMemory

from convert.cores import available_cores
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.activations import CALIBRATION_SEED
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.calibration_gguf import gguf_calibration
from qguard_edge.runtimes.llama import LlamaModel

TIMES_PLAIN, SHARE_OF_AUTOROUND, MEMORY = 12.0, 1 / 3, 1.5 * 2**30
STEPS, BATCH = 60, 8


def run_command(base: Path, to: str, out: Path, threads: int) -> dict[str, Any]:
    """The whole command: seconds by the clock and of the processor, its stages, the largest anonymous memory of its processes."""
    command = [
        sys.executable,
        "-m",
        "qguard_edge",
        "convert",
        str(base),
        "--to",
        to,
        "--threads",
        str(threads),
        "--seed",
        "1",
    ]
    before, started = os.times(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen([*command, "-o", str(out), "--json"], stdout=output) as child, TreeMemory(child.pid) as memory:
            code = child.wait()
        seconds, after = time.perf_counter() - started, os.times()
        if code:
            raise SystemExit(f"convert failed with {code}")
        output.seek(0)
        stages = json.load(output)["seconds"]
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "processor": processor, "stages": stages, "memory": memory.peaks.anonymous}


def run_autoround(python: str, folder: Path, base: Path, to: str, work: Path, threads: int) -> float:
    """Seconds of AutoRound in its own interpreter, loading and export included."""
    options = CalibrationOptions()
    rows = gguf_calibration(base, options, CALIBRATION_SEED).samples
    text = work / "text.jsonl"
    with LlamaModel(base, vocab_only=True) as vocabulary:
        text.write_text("".join(json.dumps({"text": vocabulary.detokenize(row, special=True)}) + "\n" for row in rows))
    told = {
        "model": str(folder),
        "out": str(work / "autoround"),
        "text": str(text),
        "to": parse_file_type(to).name.lower(),
        "steps": STEPS,
        "samples": len(rows),
        "seqlen": options.seqlen - 8,  # it drops shorter texts, and the borders of tokens move
        "batch": BATCH,
        "threads": threads,
        "pre": str(GgufFile(base).value("tokenizer.ggml.pre")),
    }
    worker = Path(__file__).parents[1] / "studies" / "autoround_worker.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run([python, worker, json.dumps(told)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit("\n".join(done.stderr.splitlines()[-20:]))
    return time.perf_counter() - started


def verdict(value: float, goal: float) -> str:
    """A figure beside its goal."""
    return f"{value:.2f} (goal {goal:.2f}: {'met' if value <= goal else 'missed'})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--to", default="q4_k")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--folder", type=Path, help="the same model as a folder, for AutoRound")
    parser.add_argument(
        "--autoround", help="interpreter of an environment that has auto-round; without it that row is left out"
    )
    arguments = parser.parse_args()
    if arguments.autoround and arguments.folder is None:
        parser.error("--autoround needs --folder")
    threads = arguments.threads
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        options = QuantizeOptions(parse_file_type(arguments.to), threads=threads)
        reports = [quantize(arguments.base, work / "plain.gguf", options) for _ in range(2)]
        plain, plain_processor = min(one.seconds for one in reports), min(one.processor for one in reports)
        found = run_command(arguments.base, arguments.to, work / "out.gguf", threads)
        other = None
        if arguments.autoround:
            other = run_autoround(arguments.autoround, arguments.folder, arguments.base, arguments.to, work, threads)
    print(f"plain         {plain:8.1f} s (processor {plain_processor:.1f} s)")
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found["stages"].items())
    print(f"feedback      {found['seconds']:8.1f} s (processor {found['processor']:.1f} s; {stages})")
    print(f"times plain   {verdict(found['seconds'] / plain, TIMES_PLAIN)}")
    print(f"of processor  {verdict(found['processor'] / plain_processor, TIMES_PLAIN)}")
    print(f"memory, GiB   {verdict(found['memory'] / 2**30, MEMORY / 2**30)}")
    if other is not None:
        print(f"AutoRound     {other:8.1f} s; of it {verdict(found['seconds'] / other, SHARE_OF_AUTOROUND)}")
    print(
        json.dumps(
            {
                "to": arguments.to,
                "threads": threads,
                "plain": plain,
                "plain_processor": plain_processor,
                "feedback": found,
                "autoround": other,
            }
        )
    )


if __name__ == "__main__":
    main()
