"""A full-precision folder (`--to hf`) that bitsandbytes' own `load_in_4bit` and `load_in_8bit` round to the chosen codes.

Weights are moved (`qguard_edge.rounding.bnb_moved`), and the result is checked by really quantizing each matrix. The
counterpart for llama-quantize is `moved_gguf`.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from qguard_edge.conversion.outputs.base import Job
from qguard_edge.conversion.outputs.folder import FolderOutput
from qguard_edge.conversion.report import MatrixRounding
from qguard_edge.conversion.request import FolderRequest
from qguard_edge.defenses.base import SliceKey
from qguard_edge.defenses.options import NoiseOptions, QVecOptions
from qguard_edge.rounding.bnb_moved import move_weights

ENOUGH = 0.999  # share of codes that the unmodified quantizer must reproduce without a warning


class MovedFolderOutput(FolderOutput):
    """See the module docstring."""

    def __init__(self, request: FolderRequest) -> None:
        super().__init__(request)
        self.moved = 0

    def target(self) -> None:
        """See `Output.target`: the codes of several formats cannot be learned at once."""
        return

    def _rounded(
        self, name: str, weights: Tensor, transposed: bool, job: Job, pool: ThreadPoolExecutor
    ) -> dict[str, Tensor]:
        moved = move_weights(
            weights,
            self.request.kinds,
            job.defense,
            key=lambda kind, index: SliceKey(job.seed, f"{name} {kind}", index),
            pool=pool,
            check=self.request.check_loads,
        )
        self.moved += moved.n_moved
        for plan in moved.plans:
            self.roundings.append(
                MatrixRounding(name, plan.kind, weights.numel(), plan.outcome, plan.given_up, plan.reproduced)
            )
        values = moved.weights.cpu()
        return {name: values.t() if transposed else values}

    def _quantization(self) -> dict[str, Any]:
        return {}

    def late_warnings(self) -> list[str]:
        """See `Output.late_warnings`."""
        made, defense = [], self.request.defense
        if isinstance(defense, NoiseOptions | QVecOptions) and defense.mode == "requantize":
            made.append(
                f"{defense.name} keeps the scales here (its fixed-grid mode): codes are to be reached on the folder's own scales"
            )
        for kind in self.request.kinds:
            checked = [r for r in self.roundings if r.kind == kind and r.reproduced is not None]
            weights = sum(r.n_weights for r in checked)
            share = sum(r.reproduced or 0 for r in checked) / weights if weights else 1.0
            if share < ENOUGH:
                made.append(f"bitsandbytes reproduces only {share:.3%} of the {kind} codes that were chosen")
        return made

    def moved_weights(self) -> int:
        """See `FolderOutput.moved_weights`."""
        return self.moved
