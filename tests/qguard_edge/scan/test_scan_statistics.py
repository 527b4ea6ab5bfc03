"""The statistics on weights whose positions are known because the test put them there."""

import math

import numpy as np
import pytest
import torch

from qguard_edge.scan import boxes, outliers, sanity
from qguard_edge.scan.boxes import fingerprint, holm, shape_of
from qguard_edge.scan.dose import curve_of, judge
from qguard_edge.scan.findings import Severity
from qguard_edge.scan.limits import load_limits
from qguard_edge.scan.positions import BINS, CLOSED_FORM, closed_form, from_blocks, histogram
from qguard_edge.scan.results import Point
from quant_grids import GRIDS
from quant_grids.bnb import bnb_grid
from quant_grids.ggml_type import type_named

FLAT = np.ones(BINS)


def weights(rows: int = 512, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def positions(kind: str, values: torch.Tensor, precision: str = "f32") -> np.ndarray:
    place = closed_form(kind, values.shape[1])
    assert place is not None
    return histogram(place(values, precision)).numpy()


@pytest.mark.parametrize("kind", CLOSED_FORM)
@pytest.mark.parametrize("precision", ["f32", "f16", "bf16"])
def test_untouched_weights_have_the_clean_shape(kind: str, precision: str) -> None:
    values = weights(1024).to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[precision]).float()
    shape = shape_of(kind, load_limits(), precision)
    made = fingerprint("w", positions(kind, values, precision), shape)
    assert made is not None
    assert made.peak < 1.3
    assert made.band > 0.7


def boxed(kind: str, at: float) -> torch.Tensor:
    """Weights clamped to boxes that reach `at` cells from the level, by bitsandbytes' own cells; scales untouched."""
    values = weights()
    grid = bnb_grid(kind, values.shape[1])
    blocks = grid.quantize(values)
    low, high = grid.cells(blocks, grid.unpack(blocks).codes)
    rows = grid.as_rows(values).view(low.shape)
    # Of the weights that lie between wall and box, everything goes to the box's end.
    bottom, top = low + (0.5 - at) * (high - low), high - (0.5 - at) * (high - low)
    moved = torch.where(grid.sets_scale(values).view(low.shape), rows, torch.minimum(torch.maximum(rows, bottom), top))
    return moved.view_as(values)


@pytest.mark.parametrize(("kind", "at"), [("int8", 0.4), ("nf4", 0.4875), ("fp4", 0.4875), ("nf4", 0.3)])
def test_walls_of_a_box_are_found_where_they_are(kind: str, at: float) -> None:
    made = fingerprint("w", positions(kind, boxed(kind, at)), FLAT)
    assert made is not None
    assert made.peak > 1.8
    assert made.place == pytest.approx(at, abs=0.011)
    assert made.p_value < 1e-12
    if at <= 0.4:
        assert made.band < 0.05
        assert made.band_at >= at


def test_positions_of_blocks_agree_with_closed_form() -> None:
    """Q8_0 of our own making, read back through its grid, against the closed form."""
    values = weights(64, 256)
    runs = values.view(-1, 32)
    scale = (runs.abs().amax(1, keepdim=True) / 127).half()
    codes = (runs / scale.float()).round().to(torch.int8)
    blocks = torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), 1)
    grid = GRIDS[type_named("Q8_0")]
    place, counts = from_blocks(grid, blocks, values, "f32")  # type: ignore[arg-type]
    other, also = closed_form("q8_0", 256)(values, "f32")  # type: ignore[misc]
    both = counts & also
    assert float(both.float().sum()) > 0.99 * float(also.float().sum())
    assert torch.allclose(place[both], other[both], atol=1e-4)


def test_weights_that_were_quantized_before_are_told_from_boxes() -> None:
    values = weights()
    grid = bnb_grid("nf4", 512)
    blocks = grid.quantize(values)
    again = grid.dequantize(blocks).view_as(values)
    stats = sanity.measure(again, matrix=True)
    assert sanity.on_a_grid(stats, "f32", load_limits())
    assert not sanity.on_a_grid(sanity.measure(values, matrix=True), "f32", load_limits())
    rounded = values.bfloat16().float()
    assert not sanity.on_a_grid(sanity.measure(rounded, matrix=True), "bf16", load_limits())


def test_precision_is_what_the_bits_say() -> None:
    from convert.gguf_file import TensorInfo

    def info(name: str) -> TensorInfo:
        from pathlib import Path

        return TensorInfo("w", type_named(name), (512, 512), 0, 0, Path("m"))

    values = weights()
    assert sanity.precision_of(info("F32"), values) == "f32"
    assert sanity.precision_of(info("F32"), values.bfloat16().float()) == "bf16"
    assert sanity.precision_of(info("F32"), values.half().float()) == "f16"
    assert sanity.precision_of(info("F16"), values.half().float()) == "f16"


def test_outlier_counts_against_a_plain_median() -> None:
    values = weights()
    values[:40, ::32] *= 300
    stats = outliers.measure(values)
    chunks = values.abs().view(-1, 32).numpy()
    expected = (np.sort(chunks, 1)[:, 15] * 16 < chunks.max(1)).sum()
    assert stats.blotted == expected
    assert stats.chunks == len(chunks)
    assert stats.lost == int((chunks < chunks.max(1, keepdims=True) / 16).sum())
    assert pytest.approx(stats.share, abs=0.01) == 40 / 512


def test_zero_and_broken_weights() -> None:
    zeros = torch.zeros(64, 64)
    assert outliers.measure(zeros).chunks == 0
    assert sanity.measure(zeros, matrix=True).zeros == 64 * 64
    for value in (math.nan, math.inf, -math.inf):
        broken = weights(64, 64)
        broken[3, 5] = value
        assert sanity.measure(broken, matrix=True).broken == 1
    huge = torch.full((64, 64), 3e38)
    assert sanity.measure(huge, matrix=True).broken == 0  # the sum would overflow f32


def test_a_single_tensor_with_a_peak_is_only_suspicious() -> None:
    limits = load_limits()
    shape = shape_of("nf4", limits)
    clean = [fingerprint(f"c{i}", positions("nf4", weights(seed=i)), shape) for i in range(4)]
    bad = [fingerprint(f"b{i}", positions("nf4", boxed("nf4", 0.3)), shape) for i in range(2)]
    assert all(clean)
    assert all(bad)

    def severities(prints: list) -> set[Severity]:  # type: ignore[type-arg]
        whole = boxes.pooled("m", prints, shape)
        return {finding.severity for finding in boxes.judge("nf4", prints, whole, limits) if finding.code == "QG301"}

    assert severities(clean) == set()
    assert severities([*clean, bad[0]]) == {Severity.SUSPICIOUS}
    assert severities([*clean, *bad]) == {Severity.DANGEROUS}


def test_holm_is_statsmodels_free_but_right() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([1.0, 0.5]) == pytest.approx([1.0, 1.0])


def test_dose_ratio_and_interval() -> None:
    """Documents that all fall to a half give a ratio of a half with no width; a rise gives no finding."""
    counts = [10] * 20
    sums = tuple(float(i + 1) for i in range(20))
    plain = Point(1.0, sum(sums) / 200, sums)
    half = Point(0.5, plain.mean_kl / 2, tuple(s / 2 for s in sums))
    rise = Point(0.0, plain.mean_kl * 1.2, tuple(s * 1.2 for s in sums))
    falling = curve_of("Q4_K_M", [plain, half, rise], counts)
    assert falling.ratio == pytest.approx(0.5)
    assert falling.interval == pytest.approx((0.5, 0.5))
    assert [finding.severity for finding in judge(falling, "Q4_K", load_limits())] == [Severity.DANGEROUS]
    rising = curve_of("Q4_K_M", [plain, rise], counts)
    assert rising.ratio == pytest.approx(1.2)
    assert judge(rising, "Q4_K", load_limits()) == []
