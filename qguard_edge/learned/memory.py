"""How much memory learning takes and how long it will run, before it starts; and what `--max-memory` makes of it.

Learning over the whole model (`--quantguard-scope model`) holds, per weight, teacher and student in f32, the value, step, place
and pull of each weight, its rounding variable and two plans: `MODEL_BYTES`. One decoder block at a time
(`--quantguard-scope block`, `efrap`) holds the model once and a plan, and a block's share of the rest. On a GPU the limit is
the GPU's: there, blocks leave all but one block in the host's memory.

`quantguard` first sees activations and draws codes, as `feedback` does: that keeps to the limit by itself if the limit is not
below `DRAWING_BYTES` and some logits, and its time comes on top.

`--max-memory` takes the first of these that fits: as asked; with activations recomputed in the backward pass; block by
block. The first two give the same plan, the third another one, so it is never chosen unasked.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import psutil
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from convert.gguf_file import GgufModel
from qguard_edge.defenses.options import DefenseOptions, FeedbackOptions, QuantGuardOptions
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.endtoend import CHECK_EVERY, TOKENS_ASIDE, TOKENS_PER_STEP
from qguard_edge.runtimes.devices import autocast, resolve_device
from quant_grids.errors import QGuardError

TORCH_BYTES = 300 << 20  # resident size of a process that has imported torch, measured
MODEL_BYTES = (
    34  # per weight: the model twice, value, step, place, pull and variable in f32, two plans, a gradient in flight
)
BLOCK_BYTES = 8  # per weight of the model: itself in f32; drawn and final codes, and plans
DRAWING_BYTES = 352 << 20  # this process and its child with llama.cpp, without what grows with the model, measured
LOGIT_COPIES = 5  # f32 arrays of tokens x vocabulary: two logits, their log-softmax, a gradient
ACTIVATION_FLOATS = 40  # f32 per token, layer and hidden unit that the backward pass needs, f32 and bf16 ones together
STEP_PRODUCTS = 8  # multiplications and additions per weight and token: teacher 2, student 2, backward 4
CHECK_PRODUCTS = 4  # the same of text set aside: teacher 2, student 2
OVERHEAD = 1.9  # time of a step over that of its matrix products, measured on a CPU
GRAPH_TOKENS = 512  # tokens of one graph while activations are seen
FEEDBACK_SECONDS = 4e-7  # per weight: error feedback of one weight on one core, measured
FEEDBACK_PRODUCTS = 4  # per weight and token of the text: the layer 2, its inputs' Gram matrix about 2
_BLOCK = re.compile(r"\.(\d+)\.")
_SIZE = TypeAdapter(ByteSize)


class MemoryLimitError(QGuardError):
    """Learning needs more memory than it is allowed to use."""


@dataclass(frozen=True)
class ModelSize:
    """Facts of a model that the estimates need.

    Attributes:
        weights: of all tensors.
        block: weights of the largest decoder block.
        layers: number of decoder blocks.
        vocabulary: rows of the embedding.
        width: of the hidden states.
    """

    weights: int
    block: int
    layers: int
    vocabulary: int
    width: int


def size_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> ModelSize:
    """Size of a model from the names and shapes of its tensors, those of a GGUF or of a checkpoint.

    A number between two dots in a name is that of a decoder block; the largest matrix outside is the embedding.
    """
    blocks: Counter[str] = Counter()
    weights, embedding = 0, (0, 0)
    for name, shape in shapes:
        count = math.prod(shape)
        weights += count
        if found := _BLOCK.search(name):
            blocks[found[1]] += count
        elif len(shape) == 2 and count > math.prod(embedding):
            embedding = (max(shape), min(shape))
    return ModelSize(weights, max(blocks.values(), default=0), len(blocks), *embedding)


def size_of_gguf(base: GgufModel) -> ModelSize:
    """Size of the model in a GGUF."""
    return size_of((name, tensor.shape) for name, tensor in base.tensors.items())


def bytes_needed(size: ModelSize, defense: DefenseOptions, calibration: CalibrationOptions) -> int:
    """Estimated peak resident size of learning on one device; 0 for a defense that does not learn."""
    if not defense.calibrated:
        return 0
    if draws_alone(defense):
        return TORCH_BYTES + 4 * LOGIT_COPIES * GRAPH_TOKENS * size.vocabulary + _gram_bytes(size)
    if isinstance(defense, QuantGuardOptions) and defense.scope == "model":
        tokens = tokens_per_step(defense, calibration)
        kept = 2 if defense.checkpointing else size.layers
        activations = 4 * tokens * size.width * (ACTIVATION_FLOATS * kept + size.layers)
        logits = 4 * LOGIT_COPIES * tokens * size.vocabulary
        learning = TORCH_BYTES + MODEL_BYTES * size.weights + activations + logits
    else:
        states = 4 * calibration.most_tokens * size.width
        learning = TORCH_BYTES + BLOCK_BYTES * size.weights + MODEL_BYTES * size.block + 3 * states
    drawing = DRAWING_BYTES + 8 * GRAPH_TOKENS * size.vocabulary if isinstance(defense, QuantGuardOptions) else 0
    return max(learning, drawing)


def draws_alone(defense: DefenseOptions) -> bool:
    """Whether a calibrated defense only draws codes from activations, and learns nothing."""
    return isinstance(defense, FeedbackOptions) or (isinstance(defense, QuantGuardOptions) and defense.steps == 0)


def _gram_bytes(size: ModelSize) -> int:
    """Gram matrices of a decoder whose blocks have four matrices of its width and a feed-forward part of three."""
    width = max(1, size.width)
    inner = max(0, size.block - 4 * width * width) // (3 * width)
    return 4 * (size.layers * (3 * width * width + inner * inner) + width * width)


def tokens_per_step(defense: QuantGuardOptions, calibration: CalibrationOptions) -> int:
    """Tokens of one step at most."""
    if defense.batch:
        return min(defense.batch * calibration.seqlen, calibration.most_tokens)
    return max(TOKENS_PER_STEP, calibration.seqlen)


def fit(defense: DefenseOptions, size: ModelSize, calibration: CalibrationOptions, limit: int) -> tuple[DefenseOptions, str]:
    """The options with which learning stays below a limit in bytes, and what was changed, in words ("" for nothing).

    Raises:
        MemoryLimitError: even one block at a time takes more.
    """
    need = bytes_needed(size, defense, calibration)
    if need <= limit:
        return defense, ""
    if isinstance(defense, QuantGuardOptions) and defense.scope == "model":
        saving = replace(defense, checkpointing=True)
        if bytes_needed(size, saving, calibration) <= limit:
            return saving, f"activations are recomputed (about {text_of(need)} otherwise, --max-memory {text_of(limit)})"
        blocks = replace(defense, scope="block")
        if bytes_needed(size, blocks, calibration) <= limit:
            return blocks, (
                f"learning goes block by block, as with --quantguard-scope block: the whole model at once takes about "
                f"{text_of(need)}, --max-memory allows {text_of(limit)}"
            )
        need = bytes_needed(size, blocks, calibration)
    raise MemoryLimitError(
        f"--defense {defense.name} takes about {text_of(need)} even one block at a time, --max-memory allows {text_of(limit)}; "
        "raise it, lower --calib-samples or --calib-seqlen, or choose a data-free defense such as ortho"
    )


@dataclass(frozen=True)
class LearningCost:
    """What `--dry-run` shows of a learned defense: peak memory in bytes, and seconds where they are known."""

    memory_bytes: int
    seconds: float | None


class LearningRequest(Protocol):
    """What the three kinds of conversion have in common."""

    @property
    def defense(self) -> DefenseOptions:
        """The rounding rule."""

    @property
    def calibration(self) -> CalibrationOptions:
        """The text."""

    @property
    def device(self) -> str:
        """auto, cpu or cuda."""

    @property
    def max_memory(self) -> int | None:
        """Bytes that learning may use on its device; None: no limit."""


def fitted_defense(request: LearningRequest, size: ModelSize, warnings: list[str]) -> DefenseOptions:
    """The defense as `fit` changes it under a limit; without one, a warning if the device has too little free memory.

    A defense that does not learn is returned as it is.

    Args:
        request: what the user asked for.
        size: of the model.
        warnings: gets one sentence for what is changed or scarce.

    Raises:
        MemoryLimitError: see `fit`.
    """
    defense = request.defense
    if not defense.calibrated or draws_alone(defense):
        return defense  # seeing activations keeps to the limit by itself, in several passes over the text
    if request.max_memory is not None:
        defense, note = fit(defense, size, request.calibration, request.max_memory)
        warnings += [note] if note else []
        return defense
    need, free = bytes_needed(size, defense, request.calibration), available_bytes(resolve_device(request.device))
    if need > free:
        warnings.append(
            f"learning will take about {text_of(need)}, {text_of(free)} are free; --max-memory SIZE makes it fit, if need be "
            "block by block"
        )
    return defense


def dry_cost(request: LearningRequest, size: ModelSize, warnings: list[str]) -> LearningCost | None:
    """What learning will cost under the request's limit; None for a defense that does not learn. See `fitted_defense`."""
    if not request.defense.calibrated:
        return None
    defense, device = fitted_defense(request, size, warnings), resolve_device(request.device)
    need = bytes_needed(size, defense, request.calibration)
    if draws_alone(defense) and request.max_memory is not None:
        need = min(need, request.max_memory)
    return LearningCost(need, seconds_needed(size, defense, request.calibration, device))


def seconds_needed(
    size: ModelSize, defense: DefenseOptions, calibration: CalibrationOptions, device: torch.device
) -> float | None:
    """Rough time of learning on this machine, from a short test of its matrix products; None where it is not known."""
    drawing = 0.0
    if isinstance(defense, FeedbackOptions | QuantGuardOptions):
        products = FEEDBACK_PRODUCTS * calibration.most_tokens * size.weights / product_rate(device)
        drawing = products + FEEDBACK_SECONDS * size.weights
        if draws_alone(defense):
            return drawing
    if not isinstance(defense, QuantGuardOptions) or defense.scope != "model":
        return None
    checks = 1 + -(-defense.steps // CHECK_EVERY)
    products = STEP_PRODUCTS * tokens_per_step(defense, calibration) * defense.steps
    products += CHECK_PRODUCTS * checks * max(TOKENS_ASIDE, calibration.seqlen)
    return drawing + products * size.weights * OVERHEAD / product_rate(device)


def product_rate(device: torch.device, width: int = 1024) -> float:
    """Multiplications and additions per second in matrix products, in the type that learning uses."""
    left, right = torch.randn(width, width, device=device), torch.randn(width, width, device=device)
    best = math.inf
    with autocast(device), torch.no_grad():
        for _ in range(4):
            started = time.perf_counter()
            float((left @ right)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - started)
    return float(2.0 * width**3 / best)


def available_bytes(device: torch.device) -> int:
    """Memory of a device that is free."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `24GB`, `800MB` or a plain number.

    Raises:
        MemoryLimitError: it is none of these.
    """
    try:
        count = int(_SIZE.validate_python(text))
    except ValidationError:
        count = 0
    if count <= 0:
        raise MemoryLimitError(f"--max-memory {text!r} is no size; write for example 24GiB or 800MB")
    return count


def text_of(count: int) -> str:
    """A size for people."""
    return ByteSize(count).human_readable(separator=" ")
