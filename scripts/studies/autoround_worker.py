"""Runs inside an environment of its own that has `auto-round`; called by `compare_autoround.py`, imports nothing of ours.

Run: python scripts/studies/autoround_worker.py '{"model": FOLDER, "out": FOLDER, "text": JSONL, "to": "q4_0", ...}'
"""

import json
import sys
from typing import Any

import torch


def main() -> None:
    """Tune and export."""
    told = json.loads(sys.argv[1])
    torch.set_num_threads(told["threads"])
    from auto_round import AutoRound
    from auto_round.export.export_to_gguf import export

    load = export.get_conversion

    def with_known_tokenizer(*given: Any, **named: Any) -> Any:
        """It knows tokenizers by a hash; the lab's own is unknown to it. No weight depends on the name, which is ours."""
        conversion = load(*given, **named)
        for kind in conversion.ModelBase.__subclasses__():
            kind.get_vocab_base_pre = lambda _self, _tokenizer: told["pre"]
        return conversion

    export.get_conversion = with_known_tokenizer
    rounding = AutoRound(
        told["model"],
        scheme=f"GGUF:{told['to'].upper()}",
        iters=told["steps"],
        nsamples=told["samples"],
        seqlen=told["seqlen"],
        batch_size=told["batch"],
        dataset=told["text"],
        device_map="cpu",
        enable_torch_compile=False,  # on a CPU, compiling each block took longer than tuning it
        seed=0,
    )
    rounding.quantize_and_save(told["out"], format=f"gguf:{told['to']}")


if __name__ == "__main__":
    main()
