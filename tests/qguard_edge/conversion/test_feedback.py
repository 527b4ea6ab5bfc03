"""The default defense through the whole conversion: activations seen in llama.cpp, codes drawn, the same bytes for a seed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.diff import compare_files, qguard_metadata
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from convert.hf.base import write_base_gguf
from convert.patch import GgufPatch
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.activations import activations_folder
from qguard_edge.conversion.documents import share_between_seeds
from qguard_edge.conversion.outputs.gguf import GgufOutput
from qguard_edge.conversion.outputs.plan import apply_to
from qguard_edge.conversion.report import GgufReport
from qguard_edge.conversion.request import FolderRequest, GgufRequest, PlanRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DEFAULT_DEFENSE, FeedbackOptions
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.progress import NoProgress
from qguard_edge.runtimes.fidelity import measure_fidelity
from qguard_edge.runtimes.gram_files import GramError
from tests.helpers.command import CommandLine
from tests.helpers.hf_models import CASES, make_model, save_model
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

TEXT = CalibrationOptions(samples=16, seqlen=64)


def request(model: Path, out: Path, to: str = "q4_k", *, seed: int = 3, **more: Any) -> GgufRequest:
    options = QuantizeOptions(parse_file_type(to), threads=1)
    return GgufRequest(
        model=str(model), options=options, defense=FeedbackOptions(), outfile=out, seed=seed, calibration=TEXT, **more
    )


def convert(model: Path, out: Path, to: str = "q4_k", **more: Any) -> GgufReport:
    return convert_model(request(model, out, to, **more))


def test_a_seed_gives_the_same_bytes_and_two_seeds_differ_as_the_entropy_says(tiny_base: Path, tmp_path: Path) -> None:
    first, again, other = (
        convert(tiny_base, tmp_path / f"{name}.gguf", seed=seed, check_loads=False)
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first.outfile.read_bytes() == again.outfile.read_bytes()
    weights = sum(rounding.n_weights for rounding in first.roundings)
    assert first.entropy_bits > 0.05 * weights
    assert first.entropy_bits == pytest.approx(other.entropy_bits, rel=0.02)
    differing = compare_files(first.outfile, other.outfile).codes_changed / weights
    for report in (first, other):
        assert share_between_seeds(report.roundings) == pytest.approx(differing, rel=0.05)
    assert first.activations is not None
    assert first.activations.tokens == 1024
    assert first.activations.unseen == ("token_embd.weight",)
    metadata = qguard_metadata(GgufFile(first.outfile))
    assert metadata["defense"] == "feedback"
    assert metadata["entropy.bits"] == pytest.approx(first.entropy_bits, rel=1e-6)
    assert metadata["entropy.share_between_seeds"] == pytest.approx(differing, rel=0.05)
    assert metadata["calibration.sha256"] == first.activations.calibration_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.gguf", "first.gguf", "other.gguf"]


@pytest.mark.parametrize("to", ["q4_0", pytest.param("iq3_s", marks=pytest.mark.training)])
def test_two_seeds_differ_by_as_many_codes_as_the_report_says(tiny_base: Path, tmp_path: Path, to: str) -> None:
    first, other = (convert(tiny_base, tmp_path / f"{seed}.gguf", to, seed=seed, check_loads=False) for seed in (3, 4))
    weights = sum(rounding.n_weights for rounding in first.roundings)
    differing = compare_files(first.outfile, other.outfile).codes_changed / weights
    assert share_between_seeds(first.roundings) == pytest.approx(differing, rel=0.05)


def test_a_stop_while_codes_are_chosen(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(tiny_base, tmp_path / "whole.gguf", check_loads=False)
    written: list[str] = []
    write_rows = GgufPatch.write_rows

    def stop(self: GgufPatch, tensor: Any, *rest: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(tensor.name)
        write_rows(self, tensor, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(GgufPatch, "write_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(tiny_base, tmp_path / "out.gguf", check_loads=False)
    assert len(written) == 3
    assert not (tmp_path / "out.gguf").exists()
    convert(tiny_base, tmp_path / "out.gguf", check_loads=False)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_what_was_seen_before_a_stop_is_used_again(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    convert(tiny_base, whole, check_loads=False)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(GgufOutput, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(tiny_base, out, check_loads=False)
    kept = activations_folder(out)
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir() if path.suffix == ".gram"}
    assert before
    assert not out.exists()
    times: dict[str, int] = {}
    write = GgufOutput.write

    def looked(self: GgufOutput, job: Any) -> Path:
        times.update({path.name: path.stat().st_mtime_ns for path in kept.iterdir() if path.suffix == ".gram"})
        return write(self, job)

    monkeypatch.setattr(GgufOutput, "write", looked)
    convert(tiny_base, out, check_loads=False)
    assert times == before, "the activations were measured a second time"
    assert out.read_bytes() == whole.read_bytes()
    assert not kept.exists()


def test_a_type_that_needs_an_importance_matrix_gets_one(tiny_base: Path, tmp_path: Path) -> None:
    report = convert(tiny_base, tmp_path / "out.gguf", "iq2_xs", keep_plain=True)
    assert report.loaded is not None
    assert report.plain is not None
    lattice = [rounding for rounding in report.roundings if rounding.ggml_type.name == "IQ2_XS"]
    assert lattice
    assert all(rounding.outcome.n_changed > 0 for rounding in lattice)
    assert compare_files(report.plain, report.outfile).only_code_bits


def test_experts_are_rounded_by_what_each_was_given(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen3-moe")
    folder = tmp_path / "moe"
    save_model(case, make_model(case), folder)
    save_tokenizer(train_byte_bpe(digits_then_bytes()), folder)
    report = convert(folder, tmp_path / "moe.gguf", "q8_0")
    experts = [rounding for rounding in report.roundings if "_exps" in rounding.name]
    assert experts
    assert all(rounding.outcome.n_changed > 0 for rounding in experts)
    assert report.activations is not None
    assert not [name for name in report.activations.unseen if "_exps" in name]


@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
def test_folders_for_bitsandbytes(tiny_folder: Path, tmp_path: Path, to: str) -> None:
    asked = FolderRequest(
        model=str(tiny_folder),
        to=to,
        defense=FeedbackOptions(),
        outfile=tmp_path / "out",
        seed=3,
        threads=1,
        device="cpu",
        calibration=TEXT,
    )
    report = convert_model(asked)
    assert report.loaded is not None
    assert report.activations is not None
    assert report.activations.unseen == ()
    assert report.entropy_bits > 0
    assert [rounding.outcome.alignment for rounding in report.roundings] == pytest.approx(
        [0] * len(report.roundings), abs=0.05
    )
    other = convert_model(replace(asked, outfile=tmp_path / "again", check_loads=False))
    assert [rounding.outcome for rounding in other.roundings] == [rounding.outcome for rounding in report.roundings]


def test_a_plan_holds_codes_that_move_further(tiny_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    quantize(tiny_base, plain, QuantizeOptions(parse_file_type("q4_k"), threads=1))
    planned = convert_model(
        PlanRequest(
            model=str(tiny_folder),
            base=tiny_base,
            plain=plain,
            outfile=tmp_path / "plan.safetensors",
            defense=FeedbackOptions(),
            seed=3,
            threads=1,
            device="cpu",
            calibration=TEXT,
        )
    )
    applied = apply_to(planned.outfile, plain, tmp_path / "out.gguf", overwrite=False, progress=NoProgress())
    assert sum(applied.changed.values()) == planned.outcome.n_changed > 0
    assert max(tensor.largest_step for tensor in applied.difference.tensors) > 1


def test_it_is_the_default_and_says_what_to_do_when_it_cannot_run(
    tiny_folder: Path, tmp_path: Path, cli: CommandLine
) -> None:
    assert DEFAULT_DEFENSE == "feedback"
    base = tmp_path / "base.gguf"
    write_base_gguf(tiny_folder, base)
    raw = base.read_bytes()
    at = raw.index(b"llama.attention.head_count_kv")
    value = at + len(b"llama.attention.head_count_kv") + 4
    base.write_bytes(raw[:value] + (77).to_bytes(4, "little") + raw[value + 4 :])  # llama.cpp refuses these shapes
    refused = cli("convert", base, "--to", "q4_k", "-o", tmp_path / "out.gguf", "--no-scan", "--json")
    assert refused.returncode == 2
    assert "--defense ortho" in json.loads(refused.stdout)["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]
    with pytest.raises(GramError):
        convert(base, tmp_path / "out.gguf")


@pytest.mark.parametrize(("width", "ratio"), [(FeedbackOptions.width, 1.0), (0.25, 0.8)], ids=["default", "low"])
def test_nearer_to_full_precision_than_plain_rounding(width: float, ratio: float, tiny_base: Path, tmp_path: Path) -> None:
    """In llama.cpp, on text that is not the calibration text. A random model's inputs leave little to make up for."""
    asked = request(tiny_base, tmp_path / "out.gguf", check_loads=False, keep_plain=True)
    report = convert_model(replace(asked, defense=FeedbackOptions(width=width)))
    assert report.plain is not None
    text = [
        "def mean(values):\n    return sum(values) / len(values)\n",
        "Rivers carry sand to the sea, year after year.",
    ] * 4
    plain, hardened = (measure_fidelity(tiny_base, path, text, threads=1) for path in (report.plain, report.outfile))
    assert hardened.mean_kl < ratio * plain.mean_kl
    assert max(rounding.outcome.alignment for rounding in report.roundings) < 0.08
