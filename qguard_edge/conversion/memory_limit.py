"""`--max-memory` for the defense that sees activations: one limit for this process and every child, checked before the work.

Three things run after each other, each beside what this process holds: llama.cpp with the Gram matrices of a pass, llama.cpp's
quantizer with one tensor in f32 and its result, and the choice of the codes. The first keeps to what is left by more passes
over the text, the last by fewer threads (`qguard_edge.rounding.room`); the quantizer cannot be told. What counts is memory
that belongs to no file: pages of a mapped model or Gram matrix go when the system needs them.
"""

from collections.abc import Iterable

from gguf import GGMLQuantizationType

from convert.child import resident_bytes
from convert.gguf_file import TensorInfo
from qguard_edge.learned.memory import LearningRequest, MemoryLimitError, draws_alone, text_of
from qguard_edge.rounding.room import Room

QUANTIZER_BYTES = 64 << 20  # of a child that has loaded llama.cpp, measured
RESULT_BYTES = 17 / 16  # per weight: of Q8_0, the widest type that is common


def quantizer_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Memory of llama.cpp's quantizer: the largest tensor in f32 (as it is mapped, where it is f32 already) and its result."""
    largest = 0.0
    for tensor in tensors:
        widened = 0 if tensor.ggml_type == GGMLQuantizationType.F32 else 4
        if len(tensor.shape) > 1:
            largest = max(largest, tensor.n_weights * (widened + RESULT_BYTES))
    return QUANTIZER_BYTES + int(largest)


def require_memory(tensors: Iterable[TensorInfo], limit: int) -> None:
    """Refuse a limit that some stage cannot keep.

    Args:
        tensors: of the base.
        limit: `--max-memory`, in bytes.

    Raises:
        MemoryLimitError: naming the stage, and the limit that would do.
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    here = resident_bytes("RssAnon")
    needs = {
        "llama.cpp's quantizer": quantizer_bytes(matrices),
        "choosing the codes of the widest matrix": Room(1, kept=1, ahead=False).bytes_for(
            max((tensor.columns for tensor in matrices), default=1)
        ),
    }
    stage = max(needs, key=lambda name: needs[name])
    if here + needs[stage] > limit:
        raise MemoryLimitError(
            f"--max-memory {text_of(limit)} is too little: {stage} takes about {text_of(needs[stage])} beside the "
            f"{text_of(here)} of this process; allow {text_of(here + needs[stage])}, or use --defense ortho, which sees no "
            "activations"
        )


def walk_limit(request: LearningRequest) -> int | None:
    """Bytes that the walk over the matrices keeps to; None: no limit, as where learning has settled the codes already."""
    return request.max_memory if draws_alone(request.defense) else None
