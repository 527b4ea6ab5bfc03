"""Which matrix products of a llama.cpp graph use which weights, and which of them share an input.

The scheduler asks the evaluation callback about every node before it computes it. `GraphSurvey` answers no each time, so
nothing is held up, and notes for every wanted weight what its product reads:

    MUL_MAT     src[0] weight [columns, rows, slices]   src[1] inputs [columns, tokens, ...]
    MUL_MAT_ID  src[0] weight [columns, rows, experts]  src[1] inputs [columns, slots or 1, tokens]  src[2] routes [slots, tokens]

Two weights share an input if their products read the same tensor (seen through reshapes) and, for experts, the same routes. A
weight that a graph uses several times (layers that share their weights) is measured over all its uses.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from qguard_edge.runtimes.ggml_tensor import BF16, F16, F32, I32, GgmlTensor, operations, tensor_at
from qguard_edge.runtimes.gram_files import WantedWeight

Key = tuple[int, int, int, int]
"""Address of the input behind its reshapes, of the routes (or 0), columns, slices."""


@dataclass(frozen=True)
class GraphInput:
    """An input as a graph shows it.

    Attributes:
        weights: that share it, in the order of the graph; the first one stands for all.
        columns: length of a row.
        slices: experts, or matrices of a stack.
        routed: by MUL_MAT_ID.
        slots: rows of each token, where it is routed: one for all of its experts, or one for each.
        producer: the node whose output is the input itself, if it can be told by its name alone; else empty.
        uses: products of one graph with each of these weights.
    """

    weights: tuple[str, ...]
    columns: int
    slices: int
    routed: bool
    producer: str = ""
    uses: int = 1
    slots: int = 1

    @property
    def owner(self) -> str:
        """The weight whose product is watched."""
        return self.weights[0]


def plain_name(name: bytes) -> str:
    """A tensor's name without what the scheduler puts around its copies on another device (`CUDA0#blk.0.attn_q.weight#0`)."""
    text = name.decode("utf-8", "replace")
    parts = text.split("#")
    return parts[1] if len(parts) == 3 else text


def weight_of(node: GgmlTensor, wanted: Mapping[str, WantedWeight]) -> WantedWeight | None:
    """The wanted weight that a matrix product multiplies with, a whole one; None for any other node."""
    ops = operations()
    if node.op not in (ops.mul_mat, ops.mul_mat_id):
        return None
    first = tensor_at(node.src[0])
    found = wanted.get(plain_name(first.name))
    if found is None and first.view_src:  # a reshaped weight
        whole = tensor_at(first.view_src)
        if first.view_offs == 0 and first.ne[0] == whole.ne[0] and elements(first) == elements(whole):
            found = wanted.get(plain_name(whole.name))
    return found


def elements(tensor: GgmlTensor) -> int:
    """Number of values."""
    return int(tensor.ne[0] * tensor.ne[1] * tensor.ne[2] * tensor.ne[3])


def root_of(address: int) -> int:
    """The tensor behind reshapes."""
    tensor = tensor_at(address)
    while tensor.op == operations().reshape and tensor.src[0]:
        address = tensor.src[0]
        tensor = tensor_at(address)
    return address


def key_of(node: GgmlTensor, weight: WantedWeight) -> Key:
    """Equal for two products of one graph that read the same input."""
    routed = node.op == operations().mul_mat_id
    return root_of(node.src[1]), root_of(node.src[2]) if routed else 0, weight.columns, weight.slices


@dataclass
class GraphSurvey:
    """Watches one graph.

    Attributes:
        wanted: weights by name.
        skipped: weights whose product cannot be read, with the reason.
        largest: bytes of the largest input, as f32.
    """

    wanted: Mapping[str, WantedWeight]
    skipped: dict[str, str] = field(default_factory=dict)
    largest: int = 0
    _uses: dict[str, list[tuple[Key, bool, str]]] = field(default_factory=dict)
    _slots: dict[str, int] = field(default_factory=dict)
    _names: Counter[bytes] = field(default_factory=Counter)

    def __call__(self, address: int, _ask: bool) -> bool:
        """See `EvalCallback`; never wants data."""
        node = tensor_at(address)
        self._names[node.name] += 1
        weight = weight_of(node, self.wanted)
        if weight is not None:
            reason = _unreadable(node, weight)
            if reason:
                self.skipped[weight.name] = reason
            else:
                source = tensor_at(node.src[1])
                routed = node.op == operations().mul_mat_id
                self.largest = max(self.largest, 4 * elements(source))
                self._slots[weight.name] = int(source.ne[1]) if routed else 1
                self._uses.setdefault(weight.name, []).append((key_of(node, weight), routed, plain_name(source.name)))
        return False

    def inputs(self) -> tuple[GraphInput, ...]:
        """What was seen, in the order of the graph."""
        groups: dict[tuple[Key, ...], list[str]] = {}
        for name, uses in self._uses.items():
            if name not in self.skipped and len({routed for _, routed, _ in uses}) == 1:
                groups.setdefault(tuple(key for key, _, _ in uses), []).append(name)
            else:
                self.skipped.setdefault(name, "it is used both as experts and as one matrix")
        found = []
        for names in groups.values():
            weight, uses = self.wanted[names[0]], self._uses[names[0]]
            _, routed, source = uses[0]
            alone = len(uses) == 1 and not routed and weight.slices == 1
            # ggml numbers the nodes that llama.cpp gives no name; such a number may mean another node in a larger batch.
            alone = alone and self._names[source.encode()] == 1 and not source.startswith(("node_", "leaf_"))
            producer, slots = source if alone else "", self._slots[names[0]]
            found.append(GraphInput(tuple(names), weight.columns, weight.slices, routed, producer, len(uses), slots))
        return tuple(found)

    def missing(self) -> tuple[str, ...]:
        """Wanted weights that no product of the graph used."""
        return tuple(name for name in self.wanted if name not in self._uses and name not in self.skipped)


def _unreadable(node: GgmlTensor, weight: WantedWeight) -> str:
    """Why a product gives no Gram matrix for the weight; empty if it does."""
    first, second = tensor_at(node.src[0]), tensor_at(node.src[1])
    slices = first.ne[2] * first.ne[3]
    if (first.ne[0], slices) != (weight.columns, weight.slices):
        return f"its product has {slices} matrices of {first.ne[0]} columns, not {weight.slices} of {weight.columns}"
    if second.type not in (F32, F16, BF16):
        return f"its inputs have the type number {second.type}"
    if node.op == operations().mul_mat_id and (not node.src[2] or tensor_at(node.src[2]).type != I32 or second.ne[3] != 1):
        return "its routes cannot be read"
    return ""
