"""Runs inside an environment of its own that has `auto-round`; called by scripts/compare_autoround.py, imports nothing of ours.

Run: python scripts/autoround_worker.py '{"model": FOLDER, "out": FOLDER, "text": JSONL, "to": "q4_0", ...}'
"""

import json
import sys

import torch


def main() -> None:
    """Tune and export."""
    told = json.loads(sys.argv[1])
    torch.set_num_threads(told["threads"])
    from auto_round import AutoRound

    rounding = AutoRound(
        told["model"],
        scheme=f"GGUF:{told['to'].upper()}",
        iters=told["steps"],
        nsamples=told["samples"],
        seqlen=told["seqlen"],
        batch_size=told["batch"],
        dataset=told["text"],
        device_map="cpu",
        seed=0,
    )
    rounding.quantize_and_save(told["out"], format=f"gguf:{told['to']}")


if __name__ == "__main__":
    main()
