"""How fast and how lean is `scan`, the static part?

Run: python scripts/bench/bench_scan.py [--weights 150,600] [--threads 1] [--repeat 3]

Scans random bf16 and f32 bases of several sizes, matrices like those of a small Llama, for the types that `scan` looks at by
default, and for sanity and outliers alone (what `convert` does before it quantizes). Each scan runs in a process of its own;
its peak resident size is the system's. `per core` counts processor seconds in place of wall time, for a machine that others use
too. Prints a table and, as the last line, one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from rich.console import Console
from rich.table import Table

from convert.cores import available_cores
from convert.gguf_file import GgufModel
from qguard_edge.scan.scanner import scan_model
from qguard_edge.scan.tensors import from_base

TYPES = ("q4_0", "q8_0", "int8", "nf4", "fp4")
SHAPES = ((2048, 2048), (512, 2048), (5632, 2048), (2048, 5632))


def write_model(path: Path, millions: int, dtype: str) -> None:
    """A GGUF of random matrices with about so many million weights."""
    writer = GGUFWriter(path, "llama")
    generator = np.random.default_rng(0)
    drawn = {shape: generator.standard_normal(shape, dtype=np.float32) * 0.02 for shape in SHAPES}
    done = layer = 0
    while done < millions * 1e6:
        for i, (rows, columns) in enumerate(SHAPES):
            values = np.roll(drawn[rows, columns], layer)
            name = f"blk.{layer}.{('attn_q', 'attn_k', 'ffn_up', 'ffn_down')[i]}.weight"
            if dtype == "bf16":
                bits = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
                writer.add_tensor(name, bits, raw_shape=bits.shape, raw_dtype=GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, values)
            done += rows * columns
        layer += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def child(path: Path, types: tuple[str, ...], threads: int) -> None:
    """One scan; prints weights, seconds, processor seconds and peak resident bytes."""
    base = GgufModel(path)
    started = time.process_time()
    found = scan_model(from_base(base, "bench", path), types, threads=threads)
    cpu = time.process_time() - started
    # Not getrusage: its figure is inherited from the process that started this one, which wrote the model.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    print(json.dumps({"weights": found.n_weights, "seconds": found.seconds, "cpu": cpu, "peak": peak}))


def measure(path: Path, types: tuple[str, ...], threads: int, repeat: int) -> tuple[float, float, float]:
    """Best rates in M weights per second and per processor second, and peak resident size in MB."""
    command = [sys.executable, __file__, "--child", str(path), "--types", ",".join(types), "--threads", str(threads)]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        for _ in range(repeat)
    ]
    wall, cpu = (max(run["weights"] / run[clock] for run in runs) / 1e6 for clock in ("seconds", "cpu"))
    return wall, cpu, max(run["peak"] for run in runs) / 1e6


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="150,600", help="millions")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, tuple(name for name in arguments.types.split(",") if name), arguments.threads)
        return
    table = Table(title=f"scan, {arguments.threads} threads")
    for heading in ("weights, M", "stored as", "looked at", "M weights/s", "per core", "peak MB"):
        table.add_column(heading, justify="right")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for millions in map(int, arguments.weights.split(",")):
            for dtype in ("bf16", "f32"):
                path = Path(folder) / "model.gguf"
                write_model(path, millions, dtype)
                for types in (tuple(arguments.types.split(",")), ()):
                    rate, per_core, peak = measure(path, types, arguments.threads, arguments.repeat)
                    what = ", ".join(types) or "sanity, outliers"
                    rows.append(
                        {
                            "millions": millions,
                            "dtype": dtype,
                            "types": what,
                            "rate": rate,
                            "per_core": per_core,
                            "peak_mb": peak,
                        }
                    )
                    table.add_row(str(millions), dtype, what, f"{rate:.0f}", f"{per_core:.0f}", f"{peak:.0f}")
                path.unlink()
    Console(width=140).print(table)
    print(json.dumps({"threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
