"""bitsandbytes for the lab: its levels and its rounding (`quant_grids.bnb`), and models quantized by it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qguard_edge.lab.evaluation import Distributions, FloatArray, log_softmax
from qguard_edge.runtimes.batching import Sampling
from qguard_edge.runtimes.bnb import exact_on_cpu
from qguard_edge.runtimes.hf_runner import HfRunner
from quant_grids.bnb import BLOCK as BLOCK
from quant_grids.bnb import bnb_grid

N_SEQ = 32
KINDS = ("int8", "fp4", "nf4")


def levels(kind: str) -> Tensor:
    """f32 levels of NF4 or FP4 in [-1, 1], ascending, each once."""
    return bnb_grid(kind, BLOCK).level_table(torch.device("cpu"))


def dequantized(weight: Tensor, kind: str) -> Tensor:
    """The values that bitsandbytes stores for a matrix: f32, same shape."""
    grid = bnb_grid(kind, weight.shape[1])
    with torch.no_grad():
        return grid.dequantize(grid.quantize(weight)).view(-1)[: weight.numel()].view(weight.shape)


def quantized_names(model: Any) -> list[str]:
    """Parameters that bitsandbytes quantizes through transformers: every Linear but the output head."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]


def load_quantized(folder: Path, kind: str) -> Any:
    """A model folder loaded by transformers with bitsandbytes' rounding, ready for inference on the CPU."""
    from qguard_edge.lab.hf_models import quantized_model

    return exact_on_cpu(quantized_model(folder, kind))


def greedy(model: Any, prompts: Sequence[Sequence[int]], n: int, end: int, pad: int) -> list[list[int]]:
    """Greedy continuations of many prompts by the verifier's runner, end token excluded."""
    longest = max(map(len, prompts)) + n
    runner = HfRunner(model, ends=frozenset([end]), pad=pad, n_ctx=longest, n_seq=N_SEQ, n_batch=longest)
    return [list(answer.tokens) for answer in runner.generate(prompts, n, sampling=Sampling())]


def distributions(model: Any, texts: Sequence[tuple[Sequence[int], int]]) -> Distributions:
    """Log-probabilities at the answer positions of (token ids, length of the prompt) texts."""
    rows: list[FloatArray] = []
    labels: list[int] = []
    with torch.inference_mode():
        for ids, n_prompt in texts:
            logits = model(input_ids=torch.tensor([list(ids[:-1])])).logits[0, n_prompt - 1 :]
            rows.append(log_softmax(logits.float().numpy()))
            labels += ids[n_prompt:]
    return Distributions(np.concatenate(rows), np.array(labels, np.int64))
