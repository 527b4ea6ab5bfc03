"""Products as ggml itself writes them down: stacks, permuted and half-precision inputs, reshapes, experts, copies on devices."""

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from qguard_edge.runtimes import ggml_tensor
from qguard_edge.runtimes.ggml_tensor import F16, F32, I32, library, tensor_at
from qguard_edge.runtimes.gram_files import WantedWeight
from qguard_edge.runtimes.gram_passes import Unit
from qguard_edge.runtimes.gram_sums import Sums, Watcher, mirror, new_sums
from qguard_edge.runtimes.graph_inputs import GraphSurvey

COLUMNS = 8
Array = npt.NDArray[np.float32]


class Graph:
    """Tensors in a context of ggml's; their memory comes once all are made."""

    def __init__(self) -> None:
        self.lib = library()
        self.context = self.lib.ggml_init(ggml_tensor._InitParams(1 << 18, None, True))
        self.buffer: int | None = None
        self.values: dict[int, npt.NDArray[np.generic]] = {}

    def new(self, values: npt.NDArray[np.generic], name: str = "") -> int:
        """A tensor with these values, the fastest dimension last."""
        kind = {np.dtype(np.float32): F32, np.dtype(np.float16): F16, np.dtype(np.int32): I32}[values.dtype]
        sizes = values.shape[::-1]
        address = int(self.lib.ggml_new_tensor(self.context, kind, len(sizes), (ctypes.c_int64 * len(sizes))(*sizes)))
        self.lib.ggml_set_name(address, name.encode())
        self.values[address] = np.ascontiguousarray(values)
        return address

    def product(self, weight: int, inputs: int, routes: int | None = None) -> int:
        """A node."""
        if routes is not None:
            return int(self.lib.ggml_mul_mat_id(self.context, weight, inputs, routes))
        return int(self.lib.ggml_mul_mat(self.context, weight, inputs))

    def fill(self) -> None:
        """Give everything its memory and values."""
        self.buffer = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(
            self.context, self.lib.ggml_backend_cpu_buffer_type()
        )
        for address, values in self.values.items():
            ctypes.memmove(tensor_at(address).data, values.ctypes.data, values.nbytes)

    def close(self) -> None:
        if self.buffer:
            self.lib.ggml_backend_buffer_free(self.buffer)
        self.lib.ggml_free(self.context)


@pytest.fixture
def graph() -> Iterator[Graph]:
    made = Graph()
    yield made
    made.close()


def random(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def survey(graph: Graph, wanted: dict[str, WantedWeight], nodes: list[int]) -> GraphSurvey:
    graph.fill()
    found = GraphSurvey(wanted)
    answers = [found(node, True) for node in nodes]
    assert not any(answers)
    return found


def sums_of(found: GraphSurvey, nodes: list[int]) -> list[Sums]:
    inputs = found.inputs()
    made = [new_sums(Unit(i, entry.columns, 0, entry.slices), products=True) for i, entry in enumerate(inputs)]
    watcher = Watcher(found.wanted, inputs, made)
    for node in nodes:
        if watcher(node, True):
            watcher(node, False)
    assert watcher.error is None
    for sums in made:
        sums.finish()
    return made


def wanted(**slices: int) -> dict[str, WantedWeight]:
    return {name: WantedWeight(name, COLUMNS, count) for name, count in slices.items()}


def test_a_stack_of_matrices_shares_out_the_inputs(graph: Graph) -> None:
    """As ggml repeats them: neighbours of ne2 share a matrix, and ne3 goes round."""
    inputs = random(2, 4, 5, COLUMNS)
    node = graph.product(graph.new(random(2, 3, COLUMNS), "stack"), graph.new(inputs))
    (sums,) = sums_of(survey(graph, wanted(stack=2), [node]), [node])
    assert sums.rows.tolist() == [20, 20]
    assert sums.gram is not None
    for index in (0, 1):
        rows = inputs[:, 2 * index : 2 * index + 2].reshape(-1, COLUMNS)
        assert np.allclose(sums.gram[index], rows.T @ rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["turned", "half", "plain"])
def test_inputs_that_do_not_lie_in_rows_of_f32(graph: Graph, change: str) -> None:
    rows = random(6, COLUMNS)
    make: dict[str, Callable[[], int]] = {
        "turned": lambda: int(graph.lib.ggml_transpose(graph.context, graph.new(np.ascontiguousarray(rows.T)))),
        "half": lambda: graph.new(rows.astype(np.float16)),
        "plain": lambda: graph.new(rows),
    }
    node = graph.product(graph.new(random(3, COLUMNS), "w"), make[change]())
    (sums,) = sums_of(survey(graph, wanted(w=1), [node]), [node])
    assert sums.gram is not None
    assert np.allclose(sums.gram[0], rows.T @ rows, atol=0.02 if change == "half" else 1e-5)
    assert (sums.gram[0] == sums.gram[0].T).all()


def test_reshaped_inputs_are_one_and_others_are_not(graph: Graph) -> None:
    states, other = graph.new(random(6, COLUMNS)), graph.new(random(6, COLUMNS))
    routes = graph.new(np.array([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0], [2, 1]], np.int32))
    again = int(graph.lib.ggml_reshape_2d(graph.context, states, COLUMNS, 6))
    slots = int(graph.lib.ggml_reshape_3d(graph.context, again, COLUMNS, 1, 6))
    nodes = [
        graph.product(graph.new(random(3, COLUMNS), "q"), states),
        graph.product(graph.new(random(3, COLUMNS), "k"), again),
        graph.product(graph.new(random(3, COLUMNS), "far"), other),
        graph.product(graph.new(random(3, 3, COLUMNS), "gate"), slots, routes),
        graph.product(graph.new(random(3, 3, COLUMNS), "up"), slots, routes),
        graph.product(graph.new(random(3, 3, COLUMNS), "odd"), slots, graph.new(np.zeros((6, 2), np.int32))),
    ]
    found = survey(graph, wanted(q=1, k=1, far=1, gate=3, up=3, odd=3, unused=1), nodes)
    assert [entry.weights for entry in found.inputs()] == [("q", "k"), ("far",), ("gate", "up"), ("odd",)]
    assert [entry.routed for entry in found.inputs()] == [False, False, True, True]
    assert found.missing() == ("unused",)
    sums = sums_of(found, nodes)
    assert sums[2].rows.tolist() == [4, 4, 4]
    assert sums[3].rows.tolist() == [12, 0, 0]
    rows, chosen = random(6, COLUMNS), [0, 1, 4, 5]
    assert sums[2].gram is not None
    assert np.allclose(sums[2].gram[2], rows[chosen].T @ rows[chosen], atol=1e-5)


def test_a_weight_used_twice_is_measured_over_both(graph: Graph) -> None:
    weight, first, second = (
        graph.new(random(3, COLUMNS), "w"),
        graph.new(random(6, COLUMNS)),
        graph.new(random(5, 6, COLUMNS)),
    )
    nodes = [graph.product(weight, first), graph.product(weight, second)]
    found = survey(graph, wanted(w=1), nodes)
    assert found.inputs()[0].uses == 2
    (sums,) = sums_of(found, nodes)
    assert sums.rows.tolist() == [36]


def test_copies_on_a_device_and_reshaped_weights_keep_their_name(graph: Graph) -> None:
    whole = graph.new(random(4, COLUMNS), "folded")
    folded = int(graph.lib.ggml_reshape_3d(graph.context, whole, COLUMNS, 2, 2))
    part = int(graph.lib.ggml_view_2d(graph.context, graph.new(random(4, COLUMNS), "cut"), COLUMNS, 2, 4 * COLUMNS, 0))
    nodes = [
        graph.product(graph.new(random(3, COLUMNS), "CUDA0#w#0"), graph.new(random(6, COLUMNS))),
        graph.product(folded, graph.new(random(2, 5, COLUMNS))),
        graph.product(part, graph.new(random(6, COLUMNS))),
    ]
    found = survey(graph, wanted(w=1, folded=2, cut=1), nodes)
    assert [entry.weights for entry in found.inputs()] == [("w",), ("folded",)]
    assert found.missing() == ("cut",)


def test_an_input_that_is_no_longer_shared_is_an_error(graph: Graph) -> None:
    first, second = graph.new(random(6, COLUMNS)), graph.new(random(6, COLUMNS))
    q, k = graph.new(random(3, COLUMNS), "q"), graph.new(random(3, COLUMNS), "k")
    before, after = [graph.product(q, first), graph.product(k, first)], [graph.product(q, first), graph.product(k, second)]
    found = survey(graph, wanted(q=1, k=1), before)
    watcher = Watcher(found.wanted, found.inputs(), [new_sums(Unit(0, COLUMNS, 0, 1), products=True)])
    for node in after:
        watcher(node, True)
    assert "k and q shared an input at first and do not any more" in str(watcher.error)


@pytest.mark.parametrize("size", [1, 511, 512, 1300])
def test_mirror(size: int) -> None:
    full = random(size, size)
    full = full + full.T
    lower = np.tril(full)
    mirror(lower)
    assert (lower == full).all()
