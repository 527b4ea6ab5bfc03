"""Noise, FlipGuard and QVec held to their definitions, and every defense through `convert`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from convert.diff import compare_files
from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.report import GgufReport
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.base import SliceKey, make_defense
from qguard_edge.defenses.options import (
    DATA_FREE,
    DEFENSE_OPTIONS,
    DefenseOptions,
    FlipGuardOptions,
    NoiseOptions,
    OrthoOptions,
    QVecOptions,
)
from quant_grids import Grid, ScalarFlips, grid_for
from tests.helpers import ggml_oracle

KEY = SliceKey(seed=1, tensor="blk.0.ffn_up.weight", index=0)
Q8_0, Q4_K = grid_for(GGMLQuantizationType.Q8_0), grid_for(GGMLQuantizationType.Q4_K)


def q8_blocks(scale: float, codes: np.ndarray) -> torch.Tensor:
    """Q8_0 blocks with one scale throughout: a fixed uniform grid."""
    half = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    rows = codes.astype(np.int8).view(np.uint8).reshape(-1, 32)
    return torch.from_numpy(np.concatenate([np.tile(half, (len(rows), 1)), rows], axis=1))


def q8_case(rows: int = 16, columns: int = 512, scale: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and weights whose codes are their nearest."""
    rng = np.random.default_rng(0)
    positions = rng.uniform(-100, 100, (rows, columns))
    codes = np.rint(positions)
    return q8_blocks(scale, codes), torch.from_numpy((positions * scale).astype(np.float32))


@pytest.mark.parametrize("strength", [0.1, 0.25, 1.0])
def test_qvec_on_a_fixed_uniform_grid_is_the_threshold_rule(strength: float) -> None:
    blocks, weights = q8_case()
    flips = Q8_0.flips(blocks, weights)
    fixed = make_defense(QVecOptions(mode="fixed-grid", strength=strength))
    made, _ = Q8_0.apply(blocks, flips, fixed.choose(flips, KEY))
    moving = make_defense(QVecOptions(strength=strength))
    plain = Q8_0.dequantize(blocks).view(weights.shape)
    moved = moving.move(weights, plain, 0.25, KEY)
    expected = torch.round(moved / 0.5)
    assert torch.equal(Q8_0.dequantize(made).view(weights.shape), expected * 0.5)
    assert torch.allclose(moved, weights - strength * (plain - weights))


def test_flipguard_takes_the_largest_errors_of_each_block() -> None:
    blocks, weights = q8_case()
    flips = Q8_0.flips(blocks, weights)
    rule = make_defense(FlipGuardOptions(share=0.125, bound=10.0, extremes=True))
    chosen = rule.choose(flips, KEY).view(-1, 32)
    assert torch.equal(chosen.sum(1), torch.full((len(chosen),), 4.0))
    ratio = flips.ratio.view(-1, 32)
    fourth = ratio.sort(1, descending=True).values[:, 3:4]
    # Bins are 1/64 wide: within one, order is not by error.
    assert bool((ratio[chosen > 0].view(-1, 4) >= fourth - 1 / 64).all())


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("grid", [Q8_0, Q4_K], ids=["Q8_0", "Q4_K"])
def test_flipguard_bounds_each_blocks_added_error(grid: Grid, bound: float) -> None:
    torch.manual_seed(0)
    weights = torch.randn(16, 512) * 0.05
    blocks = torch.from_numpy(ggml_oracle.quantize(int(grid.ggml_type), weights.numpy())).view(-1, grid.type_size)
    flips = grid.flips(blocks, weights)
    chosen = make_defense(FlipGuardOptions(share=1.0, bound=bound)).choose(flips, KEY)
    made, outcome = grid.apply(blocks, flips, chosen)
    assert outcome.n_changed > 0
    full = weights.view(-1, grid.block_size).double()
    before = (grid.dequantize(blocks).double() - full).square().sum(1)
    after = (grid.dequantize(made).double() - full).square().sum(1)
    # The last flip may pass the bound by half of itself; one flip costs at most a whole step squared.
    step = grid.steps(blocks).view(len(full), -1).amax(1).double() ** 2
    assert bool((after - before <= bound * before + 0.5 * step + 1e-9).all())


def test_flipguard_leaves_extremes_alone() -> None:
    blocks, weights = q8_case()
    flips = Q8_0.flips(blocks, weights)
    assert isinstance(flips, ScalarFlips)
    codes = flips.codes.view(-1, 32)
    extreme = (codes == codes.amin(1, keepdim=True)) | (codes == codes.amax(1, keepdim=True))
    spared = make_defense(FlipGuardOptions(share=1.0, bound=10.0)).choose(flips, KEY).view(-1, 32)
    asked = make_defense(FlipGuardOptions(share=1.0, bound=10.0, extremes=True)).choose(flips, KEY).view(-1, 32)
    assert spared[extreme].sum() == 0
    assert asked[extreme].sum() > 0


def test_noise_has_its_distribution() -> None:
    weights = torch.zeros(256, 1024)
    relative = make_defense(NoiseOptions(relative=0.4)).move(weights, weights, 0.05, KEY)
    absolute = make_defense(NoiseOptions(sigma=0.3)).move(weights, weights, 0.05, KEY)
    for moved, sigma in ((relative, 0.02), (absolute, 0.3)):
        assert float(moved.mean()) == pytest.approx(0.0, abs=4 * sigma / 512)
        assert float(moved.std()) == pytest.approx(sigma, rel=0.01)
        assert float((moved.abs() < sigma).float().mean()) == pytest.approx(0.6827, abs=0.005)
    again = make_defense(NoiseOptions(relative=0.4)).move(weights, weights, 0.05, KEY)
    assert torch.equal(again, relative)


@pytest.mark.parametrize("options", [{"relative": 0.4}, {"sigma": 0.1}])
def test_noise_on_the_fixed_grid_flips_with_the_right_probability(options: dict[str, float]) -> None:
    """A weight with normalised error r flips when the noise passes the middle: P = 1 - Phi((1/2 - r) / sigma)."""
    from scipy.stats import norm

    blocks, weights = q8_case(64, 2048)
    flips = Q8_0.flips(blocks, weights)
    chosen = make_defense(NoiseOptions(mode="fixed-grid", **options)).choose(flips, KEY)
    sigma = 0.2  # 0.4 half steps, or 0.1 at a scale of 0.5
    for low in (0.05, 0.2, 0.35, 0.45):
        inside = (flips.ratio >= low) & (flips.ratio < low + 0.02)
        expected = norm.sf((0.5 - flips.ratio[inside].numpy()) / sigma).mean()
        assert float(chosen[inside].mean()) == pytest.approx(expected, abs=0.03)


ALL = [DEFENSE_OPTIONS[name]() for name in DATA_FREE] + [
    NoiseOptions(mode="fixed-grid"),
    QVecOptions(mode="fixed-grid"),
    OrthoOptions(group="block"),
]


def convert(base: Path, out: Path, to: str, defense: DefenseOptions, seed: int = 1) -> GgufReport:
    options = QuantizeOptions(parse_file_type(to), threads=2)
    request = GgufRequest(
        model=str(base), options=options, defense=defense, outfile=str(out), seed=seed, keep_plain=True, overwrite=True
    )
    return convert_model(replace(request, check_loads=to == "q4_k"))


@pytest.mark.parametrize("defense", ALL, ids=lambda d: f"{d.name}-{getattr(d, 'mode', getattr(d, 'group', ''))}")
@pytest.mark.parametrize("to", ["q4_0", "q4_k", "q6_k", "q8_0", "iq4_xs", "iq3_s"])
def test_every_defense_through_convert(tiny_base: Path, tmp_path: Path, to: str, defense: DefenseOptions) -> None:
    if getattr(defense, "mode", "") == "fixed-grid" and defense.name == "noise" and to == "iq3_s":
        with pytest.raises(Exception, match="one code per weight"):
            convert(tiny_base, tmp_path / "out.gguf", to, defense)
        return
    report = convert(tiny_base, tmp_path / "out.gguf", to, defense)
    assert report.plain is not None
    found = compare_files(report.plain, report.outfile, base=tiny_base)
    moved = getattr(defense, "mode", "") == "requantize"
    assert found.only_code_bits or moved
    assert len(report.roundings) == 16
    for tensor in found.tensors:
        for rounding in report.roundings:
            if rounding.name == tensor.name:
                assert rounding.outcome.alignment == pytest.approx(tensor.alignment, abs=1e-3)
                assert tensor.codes_changed == rounding.outcome.n_changed
    if defense.name != "none":
        assert max(rounding.outcome.alignment for rounding in report.roundings) < 0.97
        assert found.codes_changed > 0


@pytest.mark.parametrize("defense", [NoiseOptions(), QVecOptions()], ids=lambda d: d.name)
def test_requantizing_is_repeatable(tiny_base: Path, tmp_path: Path, defense: DefenseOptions) -> None:
    first = convert(tiny_base, tmp_path / "a.gguf", "q4_k", defense)
    second = convert(tiny_base, tmp_path / "b.gguf", "q4_k", defense)
    assert first.hashes["output"] == second.hashes["output"]
    other = convert(tiny_base, tmp_path / "c.gguf", "q4_k", defense, seed=2)
    assert (other.hashes["output"] == first.hashes["output"]) is False


def test_moved_base_holds_the_moved_weights(tiny_base: Path, tmp_path: Path) -> None:
    """QVec with strength 0 moves nothing: the F32 copy quantizes to the plain file's tensors."""
    report = convert(tiny_base, tmp_path / "out.gguf", "q4_k", QVecOptions(strength=0.0))
    assert report.plain is not None
    found = compare_files(report.plain, report.outfile)
    assert (found.codes_changed, found.only_code_bits) == (0, True)
