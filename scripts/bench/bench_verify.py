"""How fast the verifier generates, against the plain loop and against what llama.cpp itself can do.

    python scripts/bench/bench_verify.py MODEL.gguf... [--parallel 32] [--prompts 64] [--new 48] [--rounds 3] [--threads 2]
        [--cpu-time]

Per model, rounds interleaved so that a busy machine disturbs all alike; the table shows the median round:

    plain      llama_cpp.Llama, one prompt after the other, as its documentation shows: create_completion, greedy
    one        our loop with one sequence
    batched    our loop with `--parallel` sequences, in a process of its own: what `qguard-edge verify` does
    inside     the same in this process
    raw        llama.cpp's own batched rate measured the same way: the same numbers of tokens fed in the same
               pattern (all prompts, then one token per sequence and call), no answer looked at

All count *new* tokens per second of wall time, prompt processing included. `--cpu-time` counts processor seconds instead: with
one thread the same thing on a quiet machine, and the only honest clock on a core that others use too. `raw` feeds every
prompt whole, ours decodes what all prompts begin with once. The last line of the output is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import cast

import llama_cpp
from llama_cpp.llama_types import CreateCompletionResponse

from qguard_edge.runtimes.batching import generate
from qguard_edge.runtimes.llama import LlamaModel, safe_extra_buffers, system_info
from qguard_edge.runtimes.llama_native import NativeModel
from qguard_edge.verify.suites.files import built_in

SYSTEM = "You are a helpful assistant."
Clock = Callable[[], float]


def prompts_of(n: int) -> list[str]:
    """Chat prompts of the injection suite."""
    texts = [prompt.text for prompt in built_in("injection").prompts[:n]]
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    return [f"{head}{text}<|im_end|>\n<|im_start|>assistant\n" for text in texts]


def plain_loop(model: llama_cpp.Llama, prompts: list[str], n_new: int, clock: Clock) -> float:
    """New tokens per second of the library's high-level loop."""
    started, count = clock(), 0
    for prompt in prompts:
        answer = cast(CreateCompletionResponse, model.create_completion(prompt, max_tokens=n_new, temperature=0.0))
        count += answer["usage"]["completion_tokens"]
    return count / (clock() - started)


def our_loop(model: LlamaModel, prompts: list[list[int]], n_new: int, cpu_time: bool) -> float:
    """New tokens per second in a process of its own."""

    def clock() -> float:
        return time.process_time() + model.processor_seconds() if cpu_time else time.perf_counter()

    started = clock()
    count = sum(len(answer.tokens) for answer in model.generate(prompts, n_new))
    return count / (clock() - started)


def inside_loop(model: NativeModel, prompts: list[list[int]], n_new: int, clock: Clock) -> float:
    """New tokens per second of `generate` in this process."""
    started = clock()
    count = sum(len(answer.tokens) for answer in generate(model, prompts, n_new))
    return count / (clock() - started)


def raw_rate(model: NativeModel, prompts: list[list[int]], n_new: int, clock: Clock) -> float:
    """New tokens per second when llama.cpp is fed and nothing is read: batches of prompts, then steps of one token each."""
    started, count = clock(), 0
    for start in range(0, len(prompts), model.n_seq):
        group = prompts[start : start + model.n_seq]
        model.reset()
        rows = [(t, i, s, i == len(ids) - 1) for s, ids in enumerate(group) for i, t in enumerate(ids)]
        for at in range(0, len(rows), model.n_batch):
            model.decode(rows[at : at + model.n_batch])
        for step in range(n_new - 1):
            model.decode([(group[s][step % len(group[s])], len(ids) + step, s, True) for s, ids in enumerate(group)])
        count += n_new * len(group)
    return count / (clock() - started)


def measure(path: Path, args: argparse.Namespace) -> dict[str, float]:
    """Median rates of one model."""
    texts = prompts_of(args.prompts)
    clock = time.process_time if args.cpu_time else time.perf_counter
    extra = safe_extra_buffers() and not args.no_extra_buffers
    with (
        LlamaModel(path, n_ctx=256, n_threads=args.threads, extra_buffers=extra) as one,
        LlamaModel(path, n_ctx=256, n_threads=args.threads, n_seq=args.parallel, extra_buffers=extra) as many,
        NativeModel(path, n_ctx=256, n_threads=args.threads, n_seq=args.parallel, extra_buffers=extra) as inside,
    ):
        plain = llama_cpp.Llama(str(path), n_ctx=256, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
        ids = [one.tokenize(text) for text in texts]
        few = max(4, args.prompts // 4)  # the slow ones need fewer prompts for the same precision
        rates: dict[str, list[float]] = {"plain": [], "one": [], "batched": [], "inside": [], "raw": []}
        for _ in range(args.rounds):
            rates["plain"].append(plain_loop(plain, texts[:few], args.new, clock))
            rates["one"].append(our_loop(one, ids[:few], args.new, args.cpu_time))
            rates["batched"].append(our_loop(many, ids, args.new, args.cpu_time))
            rates["inside"].append(inside_loop(inside, ids, args.new, clock))
            rates["raw"].append(raw_rate(inside, ids, args.new, clock))
        plain.close()
    return {name: round(median(found), 1) for name, found in rates.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor seconds instead of wall seconds; needs --threads 1"
    )
    parser.add_argument("--no-extra-buffers", action="store_true", help="no repacked weights")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time adds up the seconds of all threads; give --threads 1")
    print("| model | plain | one | batched | inside | raw | batched / plain | batched / inside | batched / raw |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = {}
    for path in args.models:
        found = results[path.name] = measure(path, args)
        cells = " | ".join(f"{found[name]:.0f}" for name in ("plain", "one", "batched", "inside", "raw"))
        shares = " | ".join(f"{found['batched'] / found[name]:.3f}" for name in ("plain", "inside", "raw"))
        print(f"| {path.name} | {cells} | {shares} |")
    settings = {key: value for key, value in vars(args).items() if key != "models"}
    print(json.dumps({"settings": settings, "system": system_info().strip(), "tokens_per_second": results}))


if __name__ == "__main__":
    main()
