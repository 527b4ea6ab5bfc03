"""A full-precision GGUF whose weights are moved so that the unmodified llama-quantize rounds them to hardened codes.

The papers' own setting: nobody touches the quantizer, the full-precision file changes. Whoever publishes the base and leaves
the quantizing to others can harden it this way. The counterpart for bitsandbytes is `moved_folder`.

How
---
1. Convert as for a hardened GGUF: llama.cpp's plain file, and the codes that the defense chose.
2. A weight whose code was changed moves to the nearest point of the new code's cell (`quant_grids.cells`), a margin inside it;
   all others stay, and so do the extreme weights of each sub-block, which set its scale: their flips are given up.
3. Let llama.cpp quantize the result, and count what came out.

Step 3 is needed because only the legacy types (Q4_0 ... Q8_0) take their scales from the largest weights. There every code is
reached. The k-quants and IQ4 types search for the scales with the smallest error, and moved weights change what they find: what
remains of the chosen rounding is measured, not promised. The measure that counts is the alignment of the file that llama.cpp
makes; new scales alone turn the rounding error away from the old one.
"""

from collections.abc import Sequence
from pathlib import Path

from convert.gguf_file import GgufFile
from convert.hashes import sha256_of
from convert.outputs import files_of
from qguard_edge.conversion.outputs.base import Job
from qguard_edge.conversion.outputs.gguf import HardenedGguf
from qguard_edge.conversion.report import ConversionReport, MovedGgufReport
from qguard_edge.conversion.request import MovedGgufRequest
from qguard_edge.rounding.gguf_moved import MovedTensor, WeightMove
from quant_grids.cells import SEARCHED_TYPES


class MovedGgufOutput(HardenedGguf[MovedGgufRequest, MovedGgufReport]):
    """See the module docstring."""

    default_name = "{NAME}-for-{FTYPE}.gguf"
    tensors: tuple[MovedTensor, ...] = ()

    def open(self) -> None:
        """See `Output.open`."""
        super().open()
        fixed = self.request.on_fixed_grid
        if fixed != self.request:
            self.warnings.append(
                f"{fixed.defense.name} keeps the scales here (its fixed-grid mode): codes are to be reached on the plain file's "
                "grid"
            )
        self.request = fixed

    def write(self, job: Job) -> Path:
        """See `Output.write`."""
        hardened = super().write(job)
        clock, progress = job.clock, job.progress
        move = WeightMove(self.base, self.plain, GgufFile(hardened), self.request.threads)
        weights = sum(tensor.n_weights for tensor in move.tensors)
        made, again = job.work / "moved.gguf", job.work / "again.gguf"
        with clock.stage("move"):
            progress.stage("Moving the weights", weights, "weights")
            counts = move.write(made, progress)
        with clock.stage("quantize again"):
            self.quantize(made, again, progress)
        with clock.stage("count"):
            progress.stage("Counting the codes", weights, "weights")
            self.tensors = move.count(GgufFile(again), counts, progress)
        return made

    def late_warnings(self) -> list[str]:
        """See `Output.late_warnings`."""
        return [*super().late_warnings(), *_doubts(self.tensors)]

    def hashes(self, job: Job, made: Path) -> dict[str, str]:
        """See `Output.hashes`."""
        return {"base": job.base_hash.result(), "output": sha256_of(files_of(made))}

    def report(self, common: ConversionReport) -> MovedGgufReport:
        """See `Output.report`."""
        return common.extended(
            MovedGgufReport, file_type=self.request.options.file_type, tensors=self.tensors, chosen=self.roundings
        )


def _doubts(tensors: Sequence[MovedTensor]) -> tuple[str, ...]:
    """Says which types llama.cpp fits scales to, so that the chosen codes are not all reached."""
    searched = sorted({tensor.ggml_type.name for tensor in tensors if tensor.ggml_type in SEARCHED_TYPES})
    if not searched:
        return ()
    moved = sum(t.n_moved for t in tensors if t.ggml_type in SEARCHED_TYPES)
    reached = sum(t.reached for t in tensors if t.ggml_type in SEARCHED_TYPES)
    return (
        f"llama.cpp searches for the scales of {', '.join(searched)} and finds others for moved weights: "
        f"{reached / moved if moved else 1.0:.0%} of the chosen flips were reached; convert to the type itself to have all",
    )
