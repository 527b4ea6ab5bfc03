"""Learned defenses through `convert`: inputs, report, metadata, resume from the checkpoint beside the output."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from convert.diff import compare_files, qguard_metadata
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.naming import checkpoint_path
from qguard_edge.conversion.outputs.gguf import GgufOutput
from qguard_edge.conversion.report import GgufReport
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions, EfrapOptions, FeedbackOptions, QuantGuardOptions
from qguard_edge.learned.calibration import CalibrationOptions, load_calibration
from qguard_edge.learned.quantguard import text_aside
from qguard_edge.runtimes.hf import HfLoadError, load_hf_model
from quant_grids.errors import UnsupportedError
from tests.helpers.command import CommandLine

pytestmark = pytest.mark.training
RATE = 0.2  # so large that two steps move codes


def convert(
    model: Path, out: Path, text: Path, defense: DefenseOptions, to: str = "q4_0", seed: int | None = 3
) -> GgufReport:
    request = GgufRequest(
        model=str(model),
        options=QuantizeOptions(parse_file_type(to), threads=2),
        defense=defense,
        outfile=str(out),
        device="cpu",
        seed=seed,
        check_loads=False,
        overwrite=True,
        calibration=CalibrationOptions(text, samples=36, seqlen=24),
    )
    return convert_model(request)


@pytest.mark.parametrize("to", ["q4_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs", "q2_k", "q3_k", "q4_k", "q6_k", "mxfp4_moe"])
@pytest.mark.usefixtures("steps_taken")
def test_every_kind_of_scalar_grid(tiny_folder: Path, text: Path, tmp_path: Path, to: str) -> None:
    report = convert(tiny_folder, tmp_path / "out.gguf", text, QuantGuardOptions(steps=2, rate=RATE), to)
    assert report.learned is not None
    assert report.learned.unmapped == ()
    assert report.coverage is not None
    assert len(report.roundings) == len(report.coverage.protected) > 0
    assert max(rounding.outcome.alignment for rounding in report.roundings) < 0.08
    metadata = qguard_metadata(GgufFile(report.outfile))
    assert report.activations is not None
    assert metadata["calibration.sha256"] == report.learned.calibration_sha256 == report.activations.calibration_sha256
    assert metadata["calibration.samples"] == 36
    assert metadata["moved"] == report.learned.moved > 0
    assert report.entropy_bits > 0
    assert metadata["entropy.bits"] == pytest.approx(report.entropy_bits, rel=1e-6)


@pytest.mark.parametrize(
    "defense", [QuantGuardOptions(steps=2), EfrapOptions(steps=2, alignment=0.1)], ids=["quantguard", "efrap"]
)
def test_a_gguf_is_a_model_too(tiny_base: Path, text: Path, tmp_path: Path, defense: DefenseOptions) -> None:
    report = convert(tiny_base, tmp_path / "out.gguf", text, defense)
    assert report.learned is not None
    assert report.learned.unmapped == ()
    assert report.learned.alignment == pytest.approx(0.1 if defense.name == "efrap" else 0, abs=0.02)


@pytest.mark.usefixtures("steps_taken")
def test_same_seed_same_file(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    first, again, other = (
        convert(tiny_folder, tmp_path / f"{i}.gguf", text, QuantGuardOptions(steps=2, rate=RATE), seed=seed)
        for i, seed in enumerate((3, 3, 4))
    )
    assert first.outfile.read_bytes() == again.outfile.read_bytes()
    # Of two seeds, no fewer codes differ than the entropy that is vouched for takes.
    weights = sum(rounding.n_weights for rounding in first.roundings)
    differing = compare_files(first.outfile, other.outfile).codes_changed / weights
    drawn = convert(tiny_folder, tmp_path / "drawn.gguf", text, FeedbackOptions(width=QuantGuardOptions.width))
    assert 0.3 * drawn.entropy_bits < differing * weights
    assert first.learned is not None
    assert 0 < first.entropy_bits < drawn.entropy_bits
    assert compare_files(drawn.outfile, first.outfile).codes_changed == first.learned.moved > 0


def test_without_steps_it_is_feedback(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    """The same codes; metadata alone says which command it was. Transformers is not asked."""
    drawn, none = (
        convert(tiny_folder, tmp_path / f"{rule.name}.gguf", text, rule, "q4_k")
        for rule in (FeedbackOptions(), QuantGuardOptions(steps=0, width=FeedbackOptions.width))
    )
    assert compare_files(drawn.outfile, none.outfile).codes_changed == 0
    assert none.learned is None
    assert none.entropy_bits == drawn.entropy_bits > 0
    assert none.activations is not None
    bent = convert(tiny_folder, tmp_path / "bent.gguf", text, QuantGuardOptions(steps=0, alignment=0.2, width=0.25), "q4_k")
    assert [rounding.outcome.alignment for rounding in bent.roundings] == pytest.approx(
        [0.2] * len(bent.roundings), abs=0.08
    )


def test_a_model_that_transformers_does_not_know_is_refused_before_anything_is_run(
    tiny_base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny_base.read_bytes()
    strange = tmp_path / "strange.gguf"
    at = raw.index(b"general.architecture") + len(b"general.architecture") + 12
    assert raw[at : at + 5] == b"llama"
    strange.write_bytes(raw[:at] + b"lmama" + raw[at + 5 :])
    monkeypatch.setattr(GgufOutput, "see_activations", None)  # nothing may get this far
    with pytest.raises(HfLoadError, match=r"--defense quantguard runs the model in transformers.*--defense feedback"):
        convert(strange, tmp_path / "out.gguf", text, QuantGuardOptions(steps=1))
    assert [path.name for path in tmp_path.iterdir()] == ["strange.gguf"]


@pytest.mark.usefixtures("steps_taken")
def test_an_interrupted_conversion_goes_on(
    tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qguard_edge.learned.endtoend import EndToEnd

    options = QuantGuardOptions(steps=6, batch=12, rate=0.1)
    whole = convert(tiny_folder, tmp_path / "whole.gguf", text, options, seed=9)
    step, taken = EndToEnd._step, []

    def counted(self: EndToEnd, number: int) -> float:
        taken.append(number)
        if number == 4 and len(taken) == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(EndToEnd, "_step", counted)
    monkeypatch.setattr("qguard_edge.learned.endtoend.SAVE_SECONDS", 0.0)
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_folder, out, text, options, seed=9)
    assert not out.exists()
    assert checkpoint_path(out).is_file()
    report = convert(tiny_folder, out, text, options, seed=None)  # the seed is the checkpoint's
    assert report.seed == 9
    assert taken == [0, 1, 2, 3, 4, 4, 5]
    assert out.read_bytes() == whole.outfile.read_bytes()
    assert not checkpoint_path(out).exists()


def test_what_cannot_be_learned_is_said(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    imatrix_free_lattice = "iq3_s"
    with pytest.raises(UnsupportedError, match="one code per weight"):
        convert(tiny_folder, tmp_path / "out.gguf", text, QuantGuardOptions(steps=1), imatrix_free_lattice)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tiny_folder: Path, text: Path, tmp_path: Path, cli: CommandLine) -> None:
    command = ["convert", str(tiny_folder), "--to", "q4_0", "--defense", "quantguard"]
    command += ["--calib", str(text), "--calib-seqlen", "24", "--quantguard-steps", "2", "--seed", "1"]
    done = cli(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["learned"]["samples"] == 40
    assert document["learned"]["calibration_source"] == text.name
    assert len(document["learned"]["losses"]) == 2
    assert document["entropy_bits"] > 0
    assert str(text.parent) not in done.stdout
    shown = cli(*command, "--overwrite", "-v", cwd=tmp_path)
    assert "learned on 40 texts (calib.jsonl)" in shown.stdout
    planned = cli(*command, "--dry-run", "--overwrite", "--json", cwd=tmp_path)
    assert json.loads(planned.stdout)["memory_bytes"] > 300 << 20
    wrong = cli(*command[:-6], "--calib", "no.jsonl", "--overwrite", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "--calib no.jsonl: no such file" in wrong.stderr


def test_the_text_set_aside_is_no_text_that_was_used(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    loaded = load_hf_model(tiny_folder)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(text.read_text().splitlines(keepends=True)[:3]))
    for options, own in (
        (CalibrationOptions(samples=16, seqlen=32), True),
        (CalibrationOptions(text, samples=30, seqlen=24), True),
        (CalibrationOptions(few, seqlen=24), False),
    ):
        used = load_calibration(options, loaded, "", 0)
        aside = text_aside(loaded, used, options)
        assert aside
        assert not set(aside) & set(used.samples)
        everything = load_calibration(replace(options, samples=200), loaded, "", 0).samples
        assert all(row in everything for row in aside) == own
