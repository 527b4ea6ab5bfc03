"""What a conversion by `feedback` will take: seconds of each stage, memory, disk; from the shapes of the tensors alone.

    activations  tokens x weights of the layers (llama.cpp's forward pass) + tokens x columns^2 (Gram matrices), for each pass
    plain        weights
    choose       per matrix: the factor, columns^3; the settling on a sample of rows; the rounding of its slices, on all threads

`Rates` says how fast a machine is at each. `qguard_edge.conversion.machine` measures them; `reference` has those of one
machine, good enough to tell how the stages compare.
"""

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from convert.gguf_file import GgufModel
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.rounding.room import SAMPLE_ROWS, SAMPLE_RUNS, SLICE_WEIGHTS, Room, RoomError, room_for
from qguard_edge.runtimes.activations import BATCH
from qguard_edge.runtimes.gram_files import GramError, GramIndex, MeasuredInput, fewer_rows
from qguard_edge.runtimes.gram_passes import plan_passes

PARENT_BYTES = 220 << 20  # of the process that converts, and of
CHILD_BYTES = 64 << 20  # its child that runs llama.cpp, without anything that depends on the model; measured
SPARE = 32 << 20  # see `activations_worker`
START_SECONDS, CHILD_SECONDS = 3.0, 2.0  # imports of the command, and of a child process
SCAN_RATE, CHECK_RATE = 33e6, 60e6  # weights per second and thread
SHARED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"), ("ffn_gate_exps", "ffn_up_exps"))
"""Matrices that read the same input, in most architectures."""
_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)\.weight$")


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of work with all threads at it.

    Attributes:
        threads: that share the work.
        forward: per weight and token of a forward pass.
        products: per squared column and token of a Gram matrix.
        plain: per weight that llama.cpp quantizes.
        factor: per cubed column, on one thread.
        column: of rounding a slice, per column, on one thread,
        weight: per weight, and
        feed: per weight and column.
        settle: of settling a rule, in units of rounding the sample.
    """

    threads: int
    forward: float
    products: float
    plain: float
    factor: float
    column: float
    weight: float
    feed: float
    settle: float

    def slice_seconds(self, rows: float, columns: int) -> float:
        """Rounding some rows, on one thread."""
        return columns * (self.column + rows * (self.weight + columns * self.feed))


def reference(threads: int) -> Rates:
    """The rates of a core of an AMD EPYC with AVX-512, Q4_K, shared by some threads."""
    return Rates(threads, 1.6e-11 / threads, 1.3e-11 / threads, 5.5e-8 / threads, 1.8e-11, 1.9e-5, 7e-9, 5.4e-11, 2.0)


@dataclass(frozen=True)
class RoundedMatrix:
    """A tensor that is rounded or read by a product.

    Attributes:
        name: in the GGUF.
        columns: of a row.
        rows: of all its slices together.
        slices: experts; 1 elsewhere.
    """

    name: str
    columns: int
    rows: int
    slices: int = 1

    @property
    def weights(self) -> int:
        """In it."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Model:
    """What the estimates know of a model.

    Attributes:
        matrices: of two dimensions or more.
        used: experts that one token goes to.
        seqlen: tokens of a text.
        tokens: of all texts.
    """

    matrices: tuple[RoundedMatrix, ...]
    used: int
    seqlen: int
    tokens: int

    @property
    def vocabulary(self) -> int:
        """Rows of the output matrix."""
        return max((m.rows for m in self.matrices if m.name in ("token_embd.weight", "output.weight")), default=0)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return max((m.columns for m in self.matrices if m.name in ("token_embd.weight", "output.weight")), default=0)


def matrices_of(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[RoundedMatrix, ...]:
    """The matrices among tensors of some names and shapes (ggml's order, columns first)."""
    found = []
    for name, shape in tensors:
        if len(shape) < 2 or shape[1] == 1:
            continue
        slices = 1
        for extent in shape[2:]:
            slices *= extent
        found.append(RoundedMatrix(name, shape[0], shape[1] * slices, slices))
    return tuple(found)


def model_of(base: GgufModel, calibration: CalibrationOptions) -> Model:
    """What the estimates know of a base and a text."""
    used = base.first.get(f"{base.first.get('general.architecture')}.expert_used_count")
    matrices = matrices_of((tensor.name, tensor.shape) for tensor in base.tensors.values())
    return Model(matrices, used if isinstance(used, int) else 1, calibration.seqlen, calibration.most_tokens)


@dataclass(frozen=True)
class InputWork:
    """An input, and what has been multiplied before it is there.

    Attributes:
        names: of the matrices that read it.
        columns: its length.
        slices: experts.
        used: Gram matrices that one token is added to.
        before: weights that a token has been multiplied with, attention in the same unit.
    """

    names: tuple[str, ...]
    columns: int
    slices: int
    used: int
    before: float


def inputs_of(model: Model) -> list[InputWork]:
    """The inputs in the order of the graph, as most architectures have them: an estimate, the run looks at the graph."""
    groups: dict[tuple[int, str], list[RoundedMatrix]] = {}
    output = next((m for m in model.matrices if m.name == "output.weight"), None)
    for matrix in model.matrices:
        if found := _BLOCK.match(matrix.name):
            kind = next((group[0] for group in SHARED if found[2] in group), found[2])
            groups.setdefault((int(found[1]), kind), []).append(matrix)
        elif matrix is output or (output is None and matrix.name == "token_embd.weight"):
            groups[1 << 30, "output"] = [matrix]
    before, made = 0.0, []
    for (_, kind), some in sorted(groups.items(), key=lambda item: item[0][0]):
        used = min(model.used, some[0].slices)
        made.append(InputWork(tuple(m.name for m in some), some[0].columns, some[0].slices, used, before))
        before += sum(m.weights / m.slices * min(model.used, m.slices) for m in some)
        if kind == "attn_q":
            before += 2 * model.seqlen * max(m.rows for m in some)  # scores and values
    return made


@dataclass(frozen=True)
class FeedbackCost:
    """What a conversion will take.

    Attributes:
        seconds: of each stage, in the order in which they run.
        total: seconds in all.
        memory_bytes: at most, of this process and its children together, mapped files apart.
        disk_bytes: of Gram matrices, which go when the conversion is done.
        passes: over the text.
        threads: that the times are for.
    """

    seconds: dict[str, float]
    total: float
    memory_bytes: int
    disk_bytes: int
    passes: int
    threads: int


def gram_budget(model: Model, limit: int | None, parent: int) -> int | None:
    """Bytes for the Gram matrices of one pass under a limit."""
    return None if limit is None else limit - parent - child_bytes(model) - SPARE


def child_bytes(model: Model) -> int:
    """Memory of the child that runs llama.cpp, without Gram matrices: logits twice, keys and values, a few activations."""
    widest = max((m.columns for m in model.matrices), default=1)
    layers = len({found[1] for m in model.matrices if (found := _BLOCK.match(m.name))})
    tall = max((m.rows // m.slices for m in model.matrices if m.name.endswith("attn_k.weight")), default=model.width)
    batch = max(BATCH, model.seqlen)
    return CHILD_BYTES + 8 * batch * model.vocabulary + 4 * batch * layers * tall + 16 * batch * (widest + model.width)


def cost_of(model: Model, rates: Rates, *, limit: int | None, parent: int, quantizer: int) -> FeedbackCost:
    """Predict a conversion to a GGUF.

    Args:
        model: shapes and text.
        rates: of the machine.
        limit: bytes of all processes together; None: none.
        parent: bytes of the process that converts.
        quantizer: bytes of llama.cpp's quantizer.

    Raises:
        GramError: a Gram matrix does not fit under the limit.
        RoomError: a factor does not.
    """
    inputs = inputs_of(model)
    index = GramIndex("", products=True, inputs=tuple(_measured(i, model.tokens) for i in inputs))
    passes = plan_passes(index, gram_budget(model, limit, parent))
    activations = sum(
        inputs[units[-1].position].before * rates.forward
        + sum(_share(unit.count, inputs[unit.position]) * unit.columns**2 for unit in units) * rates.products
        for units in passes
    )
    weights = sum(m.weights for m in model.matrices)
    widest = max(model.matrices, key=lambda m: m.columns, default=RoundedMatrix("", 1, 1))
    room = room_for(widest.columns, rates.threads, None if limit is None else limit - parent)
    memory_of = [entry.memory for entry in index.inputs]
    grams = max((sum(unit.count * memory_of[unit.position] for unit in units) for units in passes), default=0)
    stages = {
        "start": START_SECONDS,
        "scan": weights / (SCAN_RATE * rates.threads),
        "plain": CHILD_SECONDS / 2 + weights * rates.plain,
        "activations": CHILD_SECONDS + model.tokens * activations,
        "choose and write": walk_seconds(model, inputs, rates, room),
        "check": CHILD_SECONDS / 2 + weights / (CHECK_RATE * rates.threads),
    }
    largest = max((m.weights // m.slices for m in model.matrices), default=1)
    memory = max(child_bytes(model) + grams, quantizer, room.bytes_for(widest.columns, largest))
    disk = sum(entry.disk for entry in index.inputs)
    return FeedbackCost(stages, sum(stages.values()), parent + memory, disk, len(passes), rates.threads)


def _measured(work: InputWork, tokens: int) -> MeasuredInput:
    """An input as the run will keep it: the rows of experts come one for each token, or one for each expert that it goes to."""
    routed = work.slices > 1
    each = work.used if any("ffn_down" in name for name in work.names) else 1
    kept = fewer_rows(tokens * each, work.columns, work.slices) if routed else 0
    return MeasuredInput(work.names, work.columns, work.slices, routed, kept_rows=kept)


def _share(count: int, work: InputWork) -> float:
    """Gram matrices of a unit that one token is added to."""
    return work.used * count / work.slices


def walk_seconds(model: Model, inputs: Sequence[InputWork], rates: Rates, room: Room) -> float:
    """The walk over all matrices, played through: slices on the workers, the next matrix prepared behind them."""
    sample = SAMPLE_RUNS * SAMPLE_ROWS
    first = {name: names.names[0] for names in inputs for name in names.names}
    known: set[str] = set()
    works: list[tuple[float, float, int]] = []  # seconds to prepare, of a slice, slices
    for matrix in model.matrices:
        rows = matrix.rows // matrix.slices
        count = max(1, -(-rows * matrix.columns // SLICE_WEIGHTS))
        prepare = rates.settle * rates.slice_seconds(min(rows, sample), matrix.columns)
        one = rates.slice_seconds(rows / count, matrix.columns)
        owner = first.get(matrix.name)
        made = rates.factor * matrix.columns**3 if owner is not None and owner not in known else 0.0
        known |= {owner} if owner is not None else set()
        works += [(prepare + made, one, count)] * matrix.slices
    return _played(works, room)


def _played(works: Sequence[tuple[float, float, int]], room: Room) -> float:
    now = works[0][0] if works else 0.0
    for number, (_, one, count) in enumerate(works):
        ends = [now] * room.workers
        for _ in range(count):
            heapq.heapreplace(ends, ends[0] + one)
        done, following = max(ends), works[number + 1][0] if number + 1 < len(works) else 0.0
        now = max(done, ends[0] + following) if room.ahead else done + following
    return now


STAGE_NAMES = {
    "activations": "Seeing activations",
    "plain": "Quantizing with llama.cpp",
    "choose and write": "Choosing the rounding",
    "check": "Checking every bit",
}


def expected_stages(model: Model, rates: Rates, *, limit: int | None, parent: int) -> tuple[tuple[str, float], ...]:
    """The stages that a person sees, by how their names begin, and their seconds; none where nothing can be said."""
    try:
        cost = cost_of(model, rates, limit=limit, parent=parent, quantizer=0)
    except (GramError, RoomError):
        return ()  # the run itself says why, and more exactly
    return tuple((name, cost.seconds[key]) for key, name in STAGE_NAMES.items())
