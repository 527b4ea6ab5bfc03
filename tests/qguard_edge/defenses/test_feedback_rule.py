"""Error feedback held to its definition: centres by least squares, draws by their probabilities, entropy by counting."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from convert.diff import compare_files
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.patch import GgufPatch
from convert.quantizer import QuantizeOptions, quantize
from convert.tensor_io import RowSlice
from qguard_edge.defenses.base import MatrixRule, SliceKey, make_defense
from qguard_edge.defenses.feedback import Feedback, Tuning
from qguard_edge.defenses.feedback_pass import DAMPING, columns_of, factor_of, lean_shift, run_pass, unknown
from qguard_edge.defenses.options import FeedbackOptions
from qguard_edge.rounding.by_inputs import MatrixWork, Rounding, round_matrices
from qguard_edge.rounding.gguf import WalkOptions, coverage_of, harden
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.grams import wanted_weights
from quant_grids.errors import UnsupportedError
from tests.helpers import ggml_oracle
from tests.helpers.feedback_layers import CPU, KEY, entropy_of, grid_of, layer, output_error


def by_definition(
    name: str, blocks: Tensor, weights: Tensor, gram: Tensor, order: list[int], lean: float, width: float, uniform: Tensor
) -> np.ndarray:
    """Values after a pass, in f64: at each column the least-squares solution for all columns to come, then a weighted coin."""
    grid = grid_of(name)
    parts = grid.unpack(blocks)
    levels = np.array(grid.levels)
    matrix = gram.double().numpy() + DAMPING * float(gram.diagonal().double().mean()) * np.eye(len(order))
    plain = grid.dequantize(blocks).view(weights.shape).double().numpy() - weights.double().numpy()
    error = np.zeros(weights.shape)
    scale = parts.scale.double().view(len(weights), -1).numpy()
    offset = np.zeros_like(scale) if parts.offset is None else parts.offset.double().view(len(weights), -1).numpy()
    for place, column in enumerate(order):
        rest, done = order[place:], order[:place]
        inverse = np.linalg.inv(matrix[np.ix_(rest, rest)])
        sub = column // grid.sub_size
        for row in range(len(weights)):
            pull = matrix[np.ix_(rest, done)] @ error[row, done] + lean * plain[row, rest]
            ideal = float(weights[row, column]) - inverse[0] @ pull
            values = scale[row, sub] * levels + offset[row, sub]
            near = np.sort(np.argsort(np.abs(values - ideal), kind="stable")[:2])
            if values.min() < ideal < values.max():
                below = values[values <= ideal].max()
                above = values[values > ideal].min()
                near = np.array(sorted((int(np.argmax(values == below)), int(np.argmax(values == above)))))
            share = (ideal - values[near[0]]) / (values[near[1]] - values[near[0]])
            if width > 0 and 0.0 < share < 1.0:
                upper = min(1.0, max(0.0, 0.5 + (share - 0.5) / width))
                pick = near[int(float(uniform[place, row]) >= 1.0 - upper)]
            else:
                pick = near[int(share > 0.5)]
            error[row, column] = values[pick] - float(weights[row, column])
    return error


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q3_K", "IQ4_NL", "Q8_0", "MXFP4"])
@pytest.mark.parametrize(("lean", "width"), [(0.0, 0.0), (0.2, 0.0), (0.2, 0.6), (0.0, 1.0)])
def test_a_pass_does_what_its_definition_says(name: str, lean: float, width: float) -> None:
    columns = 256 if name.endswith("_K") else 96
    blocks, weights, gram = layer(name, 3, columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(2))
    factor = factor_of(gram, order)
    turned = columns_of(grid_of(name), blocks, weights, order, 255)
    step = float(grid_of(name).steps(blocks).square().mean())
    shift = lean_shift(turned, factor) * lean
    passed = run_pass(turned, factor, shift=shift, width=width, uniform=KEY.uniform(CPU))
    draw = KEY.uniform(CPU)
    uniform = torch.cat([draw(min(128, columns - start), 3) for start in range(0, columns, 128)])
    expected = by_definition(name, blocks, weights, gram, order.tolist(), lean, width, uniform)
    found = torch.empty(3, columns)
    found[:, order] = passed.error.T
    assert np.abs(found.numpy() - expected).max() < 1e-4 * math.sqrt(step)


def rule_for(
    name: str, rows: int, columns: int, *, alignment: float = 0.0, width: float = 0.4, known: bool = True
) -> tuple[MatrixRule, Tensor, Tensor, Tensor]:
    blocks, weights, gram = layer(name, rows, columns)
    defense = Feedback(FeedbackOptions(alignment=alignment, width=width))
    factor = defense.factor(grid_of(name), gram if known else None, columns, CPU)
    return defense.fit(grid_of(name), factor, blocks, weights, KEY), blocks, weights, gram


def test_the_layer_computes_better_what_it_should_under_the_constraint() -> None:
    rule, blocks, weights, gram = rule_for("Q4_K", 128, 512)
    made = rule.round(blocks, weights, KEY)
    grid = grid_of("Q4_K")
    plain, ours = (grid.dequantize(b).view(weights.shape) - weights for b in (blocks, made.blocks))
    assert output_error(ours, gram) < 0.7 * output_error(plain, gram)
    assert made.outcome.alignment == pytest.approx(0.0, abs=0.02)
    assert made.outcome.projection == pytest.approx(float((plain * ours).sum()), rel=1e-3, abs=1e-6)
    assert made.outcome.new_energy == pytest.approx(float(ours.square().sum()), rel=1e-4)
    assert made.outcome.n_changed == grid.changed_codes(blocks, made.blocks)[0]
    assert grid.changed_codes(blocks, made.blocks)[1] <= 2  # one beyond the two next to the weight


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("target", [0.3, 0.1, 0.0, -0.15])
def test_the_constraint_holds(target: float, known: bool) -> None:
    for name in ("Q4_0", "Q6_K", "IQ4_NL"):
        rule, blocks, weights, _ = rule_for(name, 400, 512, alignment=target, known=known)
        alignment = rule.round(blocks, weights, KEY).outcome.alignment
        assert alignment < target + 0.02, name
        if target <= 0.0 or not known:  # with known inputs, less than 0.3 may be left of itself
            assert alignment > target - 0.02, name


def test_without_a_width_the_seed_decides_nothing() -> None:
    rule, blocks, weights, _ = rule_for("Q4_K", 64, 256, width=0.0)
    one, other = (rule.round(blocks, weights, SliceKey(seed, "blk.0.ffn_up.weight", 0)) for seed in (1, 2))
    assert torch.equal(one.blocks, other.blocks)
    assert one.bits == 0.0


def test_two_seeds_differ_as_often_as_the_draws_say() -> None:
    """Independent inputs: the share of codes that differ is the mean of 2 p (1 - p), the bits are the sum of h(p)."""
    rule, blocks, weights, _ = rule_for("Q4_0", 512, 256, alignment=1.0, width=0.8, known=False)
    one, other = (rule.round(blocks, weights, SliceKey(seed, "blk.0.ffn_up.weight", 0)) for seed in (1, 2))
    grid = grid_of("Q4_0")
    first, second = grid.unpack(one.blocks).codes, grid.unpack(other.blocks).codes
    scale = grid.unpack(blocks).scale.double()
    place = weights.double().view(-1, 32) / scale
    share = place - place.floor()
    chance = (0.5 + (share - 0.5) / 0.8).clamp(0.0, 1.0)
    inside = (place > -8) & (place < 7)
    differ = float((2 * chance * (1 - chance))[inside].sum()) / inside.numel()
    bits = torch.special.entr(chance) + torch.special.entr(1 - chance)
    assert float((first != second).double().mean()) == pytest.approx(differ, rel=0.05)
    assert one.bits == pytest.approx(float(bits[inside].sum()) / math.log(2), rel=0.02)


def test_bits_are_the_entropy_of_the_whole_row() -> None:
    """Many copies of one row with correlated inputs: how often each result comes up."""
    copies, columns = 30_000, 32
    blocks, weights, gram = layer("Q4_0", 1, columns)
    defense = Feedback(FeedbackOptions(alignment=1.0, width=0.3))
    rule = defense.fit(grid_of("Q4_0"), defense.factor(grid_of("Q4_0"), gram, columns, CPU), blocks, weights, KEY)
    made = rule.round(blocks.repeat(copies, 1), weights.repeat(copies, 1), KEY)
    entropy = entropy_of(made.blocks)
    assert 1.5 < entropy < 9.0
    assert made.bits / copies == pytest.approx(entropy, rel=0.05)


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL"])
def test_at_full_width_no_error_is_expected_of_any_weight(name: str) -> None:
    """The mean over many seeds, of a row whose codes have room to both sides: what an attacker could aim at is not there."""
    copies, columns = 8_000, 64
    blocks, weights, gram = layer(name, 1, columns)
    grid = grid_of(name)
    weights = 0.4 * weights
    means = {}
    for width in (1.0, 0.5):
        defense = Feedback(FeedbackOptions(alignment=1.0, width=width))
        defense.tuning = Tuning(reach=255)
        rule = defense.fit(grid, defense.factor(grid, gram, columns, CPU), blocks, weights, KEY)
        made = rule.round(blocks.repeat(copies, 1), weights.repeat(copies, 1), KEY)
        error = (grid.dequantize(made.blocks).view(copies, columns) - weights).double()
        means[width] = error.mean(0).abs() / (error.std(0) / math.sqrt(copies))
    assert float(means[1.0].max()) < 4.5  # standard errors; the largest of 64
    assert float(means[0.5].max()) > 20


def walk(threads: int, *, experts: int = 2, seed: int = 1) -> tuple[list[Rounding], list[Tensor]]:
    """Two stacks of experts that share their inputs, rounded on a pool."""
    rows, columns = 96, 512
    grid = grid_of("Q4_K")
    data = {name: layer("Q4_K", rows * experts, columns, seed=i)[:2] for i, name in enumerate(("gate", "up"))}
    grams = [layer("Q4_K", 1, columns, seed=10 + expert)[2] for expert in range(experts)]

    class Seen:
        names = ("gate", "up")

        def of(self, tensor: str, expert: int | None = None) -> Tensor:
            assert expert is not None
            return grams[expert]

        def shares(self, tensor: str) -> tuple[str, ...]:
            return self.names

    made = {name: torch.zeros_like(blocks) for name, (blocks, _) in data.items()}
    per_row = columns // grid.block_size

    def matrix(name: str, expert: int) -> MatrixWork:
        blocks, weights = data[name]

        def read(part: RowSlice) -> tuple[Tensor, Tensor]:
            return blocks[part.start * per_row : part.stop * per_row], weights[part.start : part.stop]

        def sink(part: RowSlice, changed: Tensor) -> None:
            made[name][part.start * per_row : part.stop * per_row] = changed

        def key(part: RowSlice) -> SliceKey:
            return SliceKey(seed, name, part.index, part.start)

        return MatrixWork(name, expert, grid, columns, expert * rows, rows, read, key, sink)

    matrices = [matrix(name, expert) for name in data for expert in range(experts)]
    defense = Feedback(FeedbackOptions(alignment=0.0, width=0.5))
    with ThreadPoolExecutor(threads) as pool:
        found = list(round_matrices(matrices, defense, Seen(), pool, CPU))
    return found, list(made.values())


def test_threads_change_nothing_and_seeds_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qguard_edge.rounding.by_inputs.SLICE_WEIGHTS", 1 << 13)
    (first, one), (_, three), (_, other) = walk(1), walk(3), walk(1, seed=2)
    assert all(map(torch.equal, one, three))
    assert not any(map(torch.equal, one, other))
    assert len(first) == 4
    for rounding in first:
        assert rounding.outcome.alignment == pytest.approx(0.0, abs=0.03)
        assert rounding.bits > 0


def test_an_unknown_factor_makes_up_for_nothing() -> None:
    blocks, weights, _ = layer("Q4_K", 8, 256)
    order = torch.arange(256)
    turned = columns_of(grid_of("Q4_K"), blocks, weights, order, 255)
    same = [run_pass(turned, factor) for factor in (unknown(256, CPU), factor_of(torch.eye(256), order, 0.0))]
    assert torch.equal(same[0].codes, same[1].codes)
    assert factor_of(torch.zeros(256, 256), order).feed is None


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ4_XS", "MXFP4"])
def test_blocks_without_a_scale_and_weights_that_are_no_numbers(name: str) -> None:
    blocks, weights, gram = layer(name, 8, 256)
    weights[0] = 0.0
    blocks[: len(blocks) // 8] = torch.from_numpy(ggml_oracle.quantize(int(grid_of(name).ggml_type), weights[:1].numpy()))
    weights[3, 7], weights[4, 9] = math.nan, math.inf
    defense = Feedback(FeedbackOptions(alignment=0.0, width=0.5))
    rule = defense.fit(grid_of(name), defense.factor(grid_of(name), gram, 256, CPU), blocks, weights, KEY)
    made = rule.round(blocks, weights, KEY)
    assert math.isfinite(made.outcome.new_energy)
    assert math.isfinite(made.bits)
    if name != "MXFP4":  # which has no scale of zero
        assert torch.equal(made.blocks[: len(blocks) // 8], blocks[: len(blocks) // 8])
    healthy = grid_of(name).dequantize(made.blocks).view(8, 256)[5:]
    assert bool(torch.isfinite(healthy).all())


def test_a_file_is_rounded_by_what_its_matrices_are_fed(tiny_base: Path, tmp_path: Path) -> None:
    """From the base to the file, with Gram matrices seen in llama.cpp; the embedding, which nothing is fed to, included."""
    base = GgufModel(tiny_base)
    made_plainly = tmp_path / "plain.gguf"
    quantize(tiny_base, made_plainly, QuantizeOptions(parse_file_type("q4_k"), threads=1))
    texts = [[(7 * i + j * j) % 380 for j in range(64)] for i in range(16)]
    grams = LlamaGramSource(base).collect(wanted_weights(base), texts, tmp_path / "grams", threads=1)
    plain = GgufFile(made_plainly)
    tensors = coverage_of(base, plain).protected
    defense = make_defense(FeedbackOptions(alignment=0.0, width=0.5))
    made = []
    for threads in (1, 3):
        patch = GgufPatch(plain, tmp_path / f"{threads}.gguf", {})
        roundings = harden(base, plain, tensors, defense, WalkOptions(3, threads, inputs=grams), sink=patch.write_rows)
        patch.copy_rest(tensor.name for tensor in tensors)
        patch.close()
        made.append((tmp_path / f"{threads}.gguf").read_bytes())
    assert made[0] == made[1]
    found = compare_files(made_plainly, tmp_path / "1.gguf", base=tiny_base)
    assert found.only_code_bits
    changed = {tensor.name: tensor.codes_changed for tensor in found.tensors}
    for rounding in roundings:
        assert rounding.outcome.n_changed == changed[rounding.name]
        assert rounding.outcome.alignment == pytest.approx(0.0, abs=0.04), rounding.name
        assert rounding.bits > 0
    assert "token_embd.weight" in changed
    assert "token_embd.weight" not in grams.names
    with pytest.raises(UnsupportedError, match="--defense ortho"):
        harden(base, plain, tensors, defense, WalkOptions(3, 1), sink=patch.write_rows)
