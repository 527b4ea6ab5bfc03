"""How fast and how lean is `convert`, next to the plain quantization it builds on?

Run: python scripts/bench/bench_convert.py [--types q4_0,q4_k_m,q6_k] [--repeat 3] [--threads 2] [--models llama-150m,smollm2]
     python scripts/bench/bench_convert.py --defenses ortho,flipguard,qvec,noise --types q4_k_m,q6_k --models llama-150m

For each model and type, in one run: llama.cpp alone (`llama_model_quantize` in its child process), then the whole command
`qguard-edge convert BASE --to TYPE --defense ortho`, whose own report gives the stages. Plan alone is measured by handing
the new blocks to a sink that drops them; patch is what writing them adds, with the copy of the rest. The best of the
repeats counts. Prints a table and, as the last line, one JSON object.

With `--defenses` it compares the defenses instead: plan + patch for the rules that keep the grid (`noise` and `qvec` in their
fixed-grid mode too), and for those that move the weights and quantize again the whole of it: moving, llama.cpp, measuring.
"""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convert.cores import available_cores
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.hf.base import write_base_gguf
from convert.patch import GgufPatch
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.base import make_defense
from qguard_edge.defenses.options import DefenseOptions, NoiseOptions, OrthoOptions, QVecOptions, options_class
from qguard_edge.lab.smollm2 import make_folder
from qguard_edge.rounding.gguf import WalkOptions, coverage_of, harden


@dataclass(frozen=True)
class Row:
    """One model and type. Rates in million weights per second, sizes in MB, times in seconds."""

    model: str
    file_type: str
    million_weights: float
    plain_s: float
    plain_rate: float
    plain_rss_mb: float
    plan_rate: float
    patch_rate: float
    plan_patch_rate: float
    convert_s: float
    start_s: float
    load_s: float
    ratio: float
    convert_rss_mb: float


def random_llama(folder: Path, tokenizer_folder: Path) -> Path:
    """A 151 M Llama with random weights and widths that are multiples of 256: no k-quant falls back."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_command(base: Path, file_type: str, out: Path, threads: int) -> tuple[float, dict[str, float], float]:
    """The whole command in a fresh process: wall seconds, its stages, and the largest resident size of its processes in MB."""
    arguments = ["convert", str(base), "--to", file_type, "--defense", "ortho", "-o", str(out), "--overwrite", "--json"]
    command = [sys.executable, "-m", "qguard_edge", *arguments, "--threads", str(threads)]
    started = time.perf_counter()
    peak = 0
    # Into a file: a pipe that nobody reads until the end would hold up a long report.
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(command, stdout=output) as child:
        while child.poll() is None:
            peak = max(peak, tree_peak_rss(child.pid))
            time.sleep(0.02)
        wall = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if child.returncode != 0:
        raise SystemExit(f"convert failed with {child.returncode}")
    return wall, json.loads(text)["seconds"], peak / 1e6


def tree_peak_rss(pid: int) -> int:
    """Largest resident size so far of a process and its children, each by itself, in bytes.

    Not getrusage: what it reports for a child includes the size of the process that started it.
    """
    peak = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                peak = max(peak, tree_peak_rss(int(child)))
    return peak


@dataclass(frozen=True)
class DefenseRate:
    """Million weights per second of one defense on one type, beside plain quantization in the same run."""

    model: str
    file_type: str
    defense: str
    rate: float
    plain_rate: float


def time_plan(
    base: GgufModel, plain: GgufFile, threads: int, out: Path | None, defense: DefenseOptions | None = None
) -> float:
    """Seconds to choose every tensor's rounding (by default with ortho), and, with `out`, to write the patched file."""
    coverage = coverage_of(base, plain)
    patch = GgufPatch(plain, out, {}) if out else None
    started = time.perf_counter()
    try:
        sink = patch.write_rows if patch else (lambda *_: None)
        rule = make_defense(defense or OrthoOptions())
        harden(base, plain, coverage.protected, rule, WalkOptions(1, threads), sink=sink)
        if patch:
            patch.copy_rest(tensor.name for tensor in coverage.protected)
    finally:
        if patch:
            patch.close()
    return time.perf_counter() - started


def measure(name: str, base_path: Path, file_type: str, work: Path, threads: int, repeat: int) -> Row:
    """All figures of one model and type."""
    base = GgufModel(base_path)
    options = QuantizeOptions(parse_file_type(file_type), threads=threads)
    plain_path, out = work / "plain.gguf", work / "out.gguf"
    quantized = min((quantize(base_path, plain_path, options) for _ in range(repeat)), key=lambda report: report.seconds)
    plain = GgufFile(plain_path)
    weights = sum(tensor.n_weights for tensor in coverage_of(base, plain).protected)
    plan = min(time_plan(base, plain, threads, None) for _ in range(repeat))
    both = []
    for _ in range(repeat):
        with contextlib.suppress(FileNotFoundError):
            out.unlink()
        both.append(time_plan(base, plain, threads, out))
    wall, stages, rss = min((run_command(base_path, file_type, out, threads) for _ in range(repeat)), key=lambda run: run[0])
    load = stages.pop("load check")
    # Starting Python and importing torch, and llama.cpp's child: everything that is not work on the model.
    work_s = sum(stages.values()) - (stages["plain"] - quantized.seconds)
    return Row(
        model=name,
        file_type=options.file_type.name,
        million_weights=weights / 1e6,
        plain_s=quantized.seconds,
        plain_rate=weights / quantized.seconds / 1e6,
        plain_rss_mb=quantized.peak_rss_bytes / 1e6,
        plan_rate=weights / plan / 1e6,
        patch_rate=weights / max(min(both) - plan, 1e-3) / 1e6,
        plan_patch_rate=weights / min(both) / 1e6,
        convert_s=wall,
        start_s=wall - work_s - load,
        load_s=load,
        ratio=work_s / quantized.seconds,
        convert_rss_mb=rss,
    )


def defense_options(names: str) -> list[DefenseOptions]:
    """The named defenses with their defaults, and, where there is one, their fixed-grid mode beside them."""
    made: list[DefenseOptions] = []
    for name in names.split(","):
        options = options_class(name)()
        made.append(options)
        if isinstance(options, NoiseOptions | QVecOptions):
            made.append(replace(options, mode="fixed-grid"))
    return made


def time_requantize(base_path: Path, options: QuantizeOptions, defense: DefenseOptions, out: Path) -> float:
    """Seconds that a defense which quantizes again adds to a conversion."""
    request = GgufRequest(
        model=str(base_path), options=options, defense=defense, outfile=str(out), seed=1, overwrite=True, check_loads=False
    )
    return convert_model(request).seconds["requantize"]


def measure_defenses(
    name: str, base_path: Path, file_type: str, work: Path, threads: int, repeat: int, defenses: list[DefenseOptions]
) -> list[DefenseRate]:
    """Rates of several defenses on one model and type."""
    base = GgufModel(base_path)
    options = QuantizeOptions(parse_file_type(file_type), threads=threads)
    plain_path, out = work / "plain.gguf", work / "out.gguf"
    quantized = min(quantize(base_path, plain_path, options).seconds for _ in range(repeat))
    plain = GgufFile(plain_path)
    weights = sum(tensor.n_weights for tensor in coverage_of(base, plain).protected)
    rates = []
    for defense in defenses:
        times = []
        for _ in range(repeat):
            out.unlink(missing_ok=True)
            if make_defense(defense).requantizes:
                times.append(time_requantize(base_path, options, defense, out))
            else:
                times.append(time_plan(base, plain, threads, out, defense))
        rates.append(
            DefenseRate(name, options.file_type.name, defense.label, weights / min(times) / 1e6, weights / quantized / 1e6)
        )
    return rates


def show_defenses(rates: list[DefenseRate]) -> None:
    """The table of the defenses."""
    table = Table(title="what each defense adds to a conversion (M weights/s)")
    for heading in ("model", "type", "defense", "defense rate", "plain rate"):
        table.add_column(heading, justify="right" if "rate" in heading else "left")
    for r in rates:
        table.add_row(r.model, r.file_type, r.defense, f"{r.rate:.0f}", f"{r.plain_rate:.0f}")
    Console(width=160).print(table)


def show(rows: list[Row]) -> None:
    """The table for people."""
    table = Table(title="convert --defense ortho against plain llama_model_quantize (M weights/s, s, MB)")
    headings = ("model", "type", "plain rate", "plan", "patch", "plan+patch", "plain s", "convert s", "start s", "load s",
                "work / plain", "plain RSS", "convert RSS")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("model", "type") else "right")
    for r in rows:
        table.add_row(
            r.model, r.file_type, f"{r.plain_rate:.0f}", f"{r.plan_rate:.0f}", f"{r.patch_rate:.0f}", f"{r.plan_patch_rate:.0f}",
            f"{r.plain_s:.2f}", f"{r.convert_s:.2f}", f"{r.start_s:.2f}", f"{r.load_s:.2f}", f"{r.ratio:.2f}",
            f"{r.plain_rss_mb:.0f}", f"{r.convert_rss_mb:.0f}",
        )  # fmt: skip
    Console(width=160).print(table)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="q4_0,q4_k_m,q6_k")
    parser.add_argument("--models", default="llama-150m,smollm2")
    parser.add_argument("--defenses", help="compare these, in place of the stages of one")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    arguments = parser.parse_args()
    rows: list[Row] = []
    rates: list[DefenseRate] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        smollm2 = make_folder(work / "SmolLM2-135M-Instruct")
        for name in arguments.models.split(","):
            model = smollm2 if name == "smollm2" else random_llama(work / "llama-150m", smollm2)
            base = work / f"{name}-bf16.gguf"
            write_base_gguf(model, base)
            for file_type in arguments.types.split(","):
                common = (name, base, file_type, work, arguments.threads, arguments.repeat)
                if arguments.defenses:
                    rates += measure_defenses(*common, defense_options(arguments.defenses))
                else:
                    rows.append(measure(*common))
    if arguments.defenses:
        show_defenses(rates)
    else:
        show(rows)
    machine: dict[str, object] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    machine |= {"threads": arguments.threads}
    print(json.dumps({"rows": [*map(asdict, rows), *map(asdict, rates)], **machine}))


if __name__ == "__main__":
    main()
