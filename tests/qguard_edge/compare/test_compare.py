"""Fidelity against transformers, the compare command, and QVec's search."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert.diff import qguard_metadata
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from convert.quantizer import QuantizeOptions
from qguard_edge.cli import run
from qguard_edge.compare.defenses import DefenseRow
from qguard_edge.compare.plot import draw_compare
from qguard_edge.compare.qvec_search import search_strength
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import NoneOptions, QuantGuardOptions, QVecOptions
from qguard_edge.runtimes.fidelity import Fidelity, measure_fidelity

TEXTS = ["The quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b\n\nprint(add(1, 2))"]


def test_compare_command(tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(TEXTS))
    plot = tmp_path / "plot.svg"
    arguments = [
        "compare",
        str(tiny_base),
        "--to",
        "q4_k",
        "--defenses",
        "none,ortho,flipguard,feedback",
        "--text",
        str(text),
    ]
    assert run([*arguments, "--plot", str(plot), "--json"]) == 0
    rows = {row["defense"]: row for row in json.loads(capfd.readouterr().out)["rows"]}
    assert set(rows) == {"none", "ortho", "flipguard", "feedback"}
    assert rows["none"]["alignment"] == 1.0
    assert rows["none"]["share_flipped"] == 0.0
    assert -0.25 < rows["ortho"]["alignment"] < 0.0  # the Q6_K tensors of the mixture go below 0
    assert 0.0 < rows["flipguard"]["alignment"] < 1.0
    assert rows["feedback"]["alignment"] == pytest.approx(0, abs=0.05)
    assert rows["feedback"]["fidelity"]["mean_kl"] < rows["ortho"]["fidelity"]["mean_kl"]
    assert all(row["fidelity"]["mean_kl"] > 0 for row in rows.values())
    assert plot.read_text().startswith("<?xml")
    assert ">feedback</text>" in plot.read_text()
    assert run([*arguments[:5], "none,flipguard", *arguments[6:], "--plot", str(tmp_path / "b.svg")]) == 0
    said = capfd.readouterr().out
    assert "flipguard" in said
    assert f"wrote {tmp_path / 'b.svg'}" in said


def test_no_label_leaves_the_frame() -> None:
    fidelity = Fidelity(0.1, (0.09, 0.11), 0.1, 0.9, 1.0, 100, 2)
    rows = [DefenseRow(NoneOptions(), alignment, 0.1, 0.1, fidelity, 1.0) for alignment in (1.0, 0.5, -0.15)]
    rows.append(DefenseRow(QuantGuardOptions(), 1.0, 0.1, 0.1, fidelity, 1.0))
    figure = draw_compare(rows, "t")
    figure.canvas.draw()
    (axes,) = figure.axes
    frame = axes.get_window_extent()
    for label in axes.texts:
        box = label.get_window_extent()
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1


def _request(base: Path, out: Path) -> GgufRequest:
    options = QuantizeOptions(parse_file_type("q4_k"))
    return GgufRequest(model=str(base), options=options, defense=QVecOptions(), outfile=str(out), seed=0, check_loads=False)


def test_qvec_search_takes_the_closest(tiny_base: Path, tmp_path: Path) -> None:
    search = search_strength(_request(tiny_base, tmp_path / "out.gguf"), TEXTS, strengths=(0.1, 1.5))
    by_strength = {row.defense: row.fidelity.mean_kl for row in search.rows}
    assert search.best == min(by_strength, key=lambda options: by_strength[options])
    # Over-correcting by half again throws every weight to the far side of its cell.
    assert search.best == QVecOptions(strength=0.1)
    assert "0.1" in search.summary


def test_convert_searches_lambda_on_a_text(tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "t.txt", tmp_path / "out.gguf"
    text.write_text("\n\n".join(TEXTS))
    arguments = ["convert", str(tiny_base), "--to", "q4_0", "--defense", "qvec", "-o", str(out), "--overwrite"]
    assert run([*arguments, "--qvec-text", str(text)]) == 0
    assert "closest to full precision" in capfd.readouterr().err
    params: Any = qguard_metadata(GgufFile(out))["params"]
    chosen = params["strength"]
    assert chosen in (0.1, 0.25, 0.5)
    assert run(arguments) == 0
    assert "fixed default" in capfd.readouterr().err
    assert run([*arguments, "--qvec-text", str(text), "--qvec-strength", "0.3"]) == 2
    assert "give one of them" in capfd.readouterr().err
    assert run(["convert", str(tiny_base), "--to", "q4_0", "--qvec-text", str(text)]) == 2
    assert "belongs to --defense qvec" in capfd.readouterr().err


def test_plain_file_through_convert_is_the_plain_row_of_compare(tiny_base: Path, tmp_path: Path) -> None:
    """The none row measures llama.cpp's own file."""
    out = tmp_path / "plain.gguf"
    request = _request(tiny_base, out)
    convert_model(
        GgufRequest(
            model=str(tiny_base), options=request.options, defense=NoneOptions(), outfile=str(out), check_loads=False
        )
    )
    direct = measure_fidelity(tiny_base, out, TEXTS)
    from qguard_edge.compare.defenses import compare_defenses

    (row,) = compare_defenses(request, [NoneOptions()], TEXTS)
    assert row.fidelity.mean_kl == pytest.approx(direct.mean_kl, rel=1e-6)
