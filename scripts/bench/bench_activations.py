"""What seeing activations costs: llama.cpp's forward pass alone, with sums of squares, and with Gram matrices.

Run: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python scripts/bench/bench_activations.py BASE.gguf TEXT [--tokens N] [--threads N]

Processor seconds are what to compare on a machine that does other things too; the ratio to the plain pass is the result.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from convert.child import resident_bytes
from convert.gguf_file import GgufModel
from qguard_edge.runtimes.activations import BATCH
from qguard_edge.runtimes.activations_job import ActivationJob
from qguard_edge.runtimes.activations_worker import ActivationRun
from qguard_edge.runtimes.grams import wanted_weights
from qguard_edge.runtimes.tokens import llama_tokens

ARMS = ("plain", "squares", "Gram matrices")
ROW = 256


def run(arm: str, base: GgufModel, rows: tuple[tuple[int, ...], ...], threads: int, batch: int) -> dict[str, float]:
    """One arm in this process: seconds by the clock and of the processor, and resident bytes that belong to no file."""
    with tempfile.TemporaryDirectory() as place:
        job = ActivationJob(
            "bench", str(base.path), place, wanted_weights(base), rows, arm == ARMS[2], threads, batch, None, 0, False, False
        )  # fmt: skip
        runner = ActivationRun(job, report=lambda **_event: None)
        started, used = time.perf_counter(), time.process_time()
        if arm == ARMS[0]:
            runner.forward()
        else:
            runner.run()
        seconds, processor = time.perf_counter() - started, time.process_time() - used
        figures = runner.figures
        runner.model.close()
    return {
        "seconds": seconds,
        "processor": processor,
        "tokens_per_second": sum(map(len, rows)) / seconds,
        "products": figures["products"],
        "callback_without_products": figures["callback"] - figures["products"],
        "anonymous_bytes": figures["anonymous_bytes"] or resident_bytes("RssAnon"),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=BATCH)
    options = parser.parse_args()
    base = GgufModel(options.base)
    ids = llama_tokens(options.base, [options.text.read_text(encoding="utf-8")]).texts[0][: options.tokens]
    rows = tuple(ids[start : start + ROW] for start in range(0, len(ids), ROW))
    results = {arm: run(arm, base, rows, options.threads, options.batch) for arm in ARMS}
    for arm, found in results.items():
        ratio = found["processor"] / results[ARMS[0]]["processor"]
        print(
            f"{arm:14} {found['seconds']:7.1f} s  processor {found['processor']:7.1f} s (x{ratio:.2f})  "
            f"{found['tokens_per_second']:6.0f} tokens/s  products {found['products']:6.1f} s  "
            f"callback {found['callback_without_products']:5.2f} s  {found['anonymous_bytes'] / 2**20:6.0f} MiB"
        )
    print(json.dumps({"tokens": len(ids), "threads": options.threads, "batch": options.batch, "arms": results}))


if __name__ == "__main__":
    main()
