"""The public Python API: its names, its types, and that it does what the commands do."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import assert_type, get_args

import pytest
from safetensors.torch import load_file, save_file

import qguard_edge
from convert.ftypes import ALIASES, FILE_TYPES
from convert.gguf_file import GgufFile
from convert.quantizer import QuantizeOptions
from qguard_edge import (
    BaselineRequest,
    CheckRequest,
    FolderRequest,
    GgufReport,
    GgufRequest,
    MovedGgufRequest,
    PlanRequest,
    QGuardError,
    RefusedError,
    ScanGuard,
    ScanRequest,
    Severity,
    Verification,
    VerifyRequest,
    apply,
    baseline,
    check,
    choose_suites,
    compare,
    convert,
    diff,
    dry_run,
    inspect,
    plan,
    read_pack,
    request_for,
    scan,
    to_document,
    verify,
    write_pack,
)
from qguard_edge.cli import run
from qguard_edge.cli.convert.flags import ConvertFlags
from qguard_edge.cli.convert.request import request_from
from qguard_edge.conversion.request_for import FolderName, GgufName
from qguard_edge.defenses.options import OrthoOptions, parse_defense
from qguard_edge.learned.calibration import CalibrationOptions
from quant_grids.errors import UnsupportedError


def alone(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cli(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> dict:  # type: ignore[type-arg]
    run([*map(str, arguments), "--json"])
    document: dict = json.loads(capfd.readouterr().out)  # type: ignore[type-arg]
    return document


@pytest.fixture
def broken_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a weight that is no number."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# Names ----------------------------------------------------------------------------------------------------------------


def test_type_checkers_see_the_names_that_programs_get() -> None:
    tree = ast.parse(Path(qguard_edge.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted([*imported, "__version__"]) == sorted(qguard_edge.__all__)
    for name, module in imported.items():
        assert module is not None
        assert getattr(qguard_edge, name) is getattr(import_module(module), name)
        assert getattr(qguard_edge, name).__module__ == module


def test_names_are_loaded_when_they_are_asked_for() -> None:
    heavy = "{'torch', 'transformers', 'llama_cpp', 'gguf', 'numpy'} & set(sys.modules)"
    assert alone(f"import sys, qguard_edge; dir(qguard_edge); qguard_edge.__all__; print(sorted({heavy}))") == "[]"
    assert alone(f"import sys; from qguard_edge import convert, QGuardError; print(sorted({heavy}))") == "[]"
    assert alone(f"import sys; from qguard_edge import GgufRequest; print('torch' in {heavy})") == "True"


@pytest.mark.parametrize("first", ["", "import qguard_edge.scan.findings, qguard_edge.verify, qguard_edge.compare;"])
def test_functions_are_not_hidden_by_packages_of_the_same_name(first: str) -> None:
    code = f"{first}from qguard_edge import scan, verify, compare; print(scan.__module__, verify.__module__, compare.__module__)"
    assert alone(code) == "qguard_edge.api qguard_edge.api qguard_edge.api"
    code = (
        f"{first}from qguard_edge import scan; from qguard_edge.scan import findings; from qguard_edge import scan as again"
    )
    assert alone(f"{code}; print(findings.__name__, scan is again)") == "qguard_edge.scan.findings True"


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = qguard_edge.convrt  # type: ignore[attr-defined]
    assert set(qguard_edge.__all__) <= set(dir(qguard_edge))


def test_the_table_of_functions_is_true() -> None:
    """Every public function stands in docs/python.md, with its parameters and defaults."""
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", text, re.MULTILINE))
    functions = {name for name in qguard_edge.__all__ if isinstance(getattr(qguard_edge, name), FunctionType)}
    helpers = {name for name in functions if getattr(qguard_edge, name).__module__ != "qguard_edge.api"} | {"to_document"}
    assert set(table) == functions - helpers
    for name, written in table.items():
        parameters = signature(getattr(qguard_edge, name)).parameters.values()
        shown = [f"{one.name}={one.default!r}" if one.default is not one.empty else one.name for one in parameters]
        assert [part for part in shown if not part.startswith("progress")] == written.split(", ")
    assert all(f"`{name}" in text for name in helpers)
    classes = re.findall(r"\b[A-Z][a-z]+[A-Z]\w*(?:Request|Report|Error|Guard|Difference|Summary|Row)\b", text)
    assert set(classes) <= set(qguard_edge.__all__)


# Requests -------------------------------------------------------------------------------------------------------------


def test_types_are_known_to_the_type_checker() -> None:
    names = {file_type.name.lower() for file_type in FILE_TYPES} | {alias.lower() for alias in ALIASES}
    assert set(get_args(GgufName)) == names
    assert_type(request_for("m", "q4_k"), GgufRequest)
    assert_type(request_for("m", "nf4"), FolderRequest)
    assert_type(request_for("m", "gguf", target="q4_0"), MovedGgufRequest)
    assert all(isinstance(request_for("m", kind), FolderRequest) for kind in get_args(FolderName))
    assert isinstance(request_for("m", "gguf", target="q4_0"), MovedGgufRequest)


def test_plain_values_become_fields() -> None:
    made = request_for(
        Path("m"), "Q4_K", defense="ortho:width=1", imatrix="i.gguf", tensor_types=["ffn_down=q6_k"], threads=3, seed=0,
        calibration="chats.jsonl", max_memory="2KiB", keep_plain=True, revision=None, check_loads=False,
    )  # fmt: skip
    kinds = (("ffn_down", "q6_k"),)
    file_type = next(file_type for file_type in FILE_TYPES if file_type.name == "Q4_K_M")
    assert made == GgufRequest(
        model="m",
        options=QuantizeOptions(file_type, threads=3, imatrix=Path("i.gguf"), tensor_types=kinds),
        defense=OrthoOptions(width=1.0),
        seed=0,
        calibration=CalibrationOptions(Path("chats.jsonl")),
        max_memory=2048,
        keep_plain=True,
        check_loads=False,
    )


@pytest.mark.parametrize(
    ("to", "values", "named"),
    [
        ("q4_k", {"double_quant": True}, "double_quant"),
        ("nf4", {"pure": True}, "pure"),
        ("gguf", {"target": "q4_0", "keep_plain": True}, "keep_plain"),
        ("gguf", {}, "--target"),
        ("q4_k", {"target": "q4_0"}, "--target"),
        ("q4_9", {}, "q4_9"),
        ("q4_k", {"defense": "ortho:wide=1"}, "wide"),
    ],
)
def test_what_does_not_go_together_is_refused(to: str, values: dict[str, str], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        request_for("m", to, **values)


def test_the_command_line_makes_the_same_requests() -> None:
    flags = ConvertFlags(
        model="m", to="q4_k", seed=0, no_load_check=True, imatrix=Path("i"), pure=True, max_memory="2KiB", threads=0
    )
    wanted = request_for("m", "q4_k", seed=0, check_loads=False, imatrix="i", pure=True, max_memory=2048)
    assert request_from(flags, {}) == wanted
    flags = ConvertFlags(model="m", to="hf", target="nf4", bnb_skip=["head"], defense="none")
    assert request_from(flags, {}) == request_for("m", "hf", target="nf4", skip=["head"], defense="none")


def test_suites_can_be_names_files_and_values(tmp_path: Path) -> None:
    assert [suite.name for suite in choose_suites()] == ["injection", "refusal", "code"]
    (code,) = choose_suites("code")
    assert [suite.name for suite in choose_suites(["injection", code])] == ["injection", "code"]
    assert choose_suites("drift") == ()
    with pytest.raises(QGuardError, match="magic"):
        choose_suites("injection, magic")


# Doing ----------------------------------------------------------------------------------------------------------------


def test_convert_scans_unless_told_otherwise(broken_folder: Path, tmp_path: Path) -> None:
    request = request_for(broken_folder, "q8_0", outfile=tmp_path / "out.gguf", check_loads=False)
    with pytest.raises(RefusedError) as refused:
        convert(request)
    assert not (tmp_path / "out.gguf").exists()
    document = to_document(refused.value)
    assert document["status"] == "refused"
    assert "QG101" in {finding["code"] for finding in document["findings"]}
    guard = ScanGuard(keep=True)
    with pytest.raises(UnsupportedError, match="must be verified"):
        convert(request, scan=guard)
    with pytest.raises(UnsupportedError, match="give one of them"):
        ScanGuard(accept=True, keep=True)


def test_findings_of_an_accepted_model_can_be_read(broken_folder: Path) -> None:
    found = scan(ScanRequest(str(broken_folder), threads=1))
    assert found.worst is Severity.DANGEROUS
    assert to_document(found)["status"] == "found"
    assert to_document(found, fail_on=None)["status"] == "ok"


def test_what_cannot_be_verified_is_refused_before_any_work(tmp_path: Path) -> None:
    for request in (
        request_for("no-such-folder", "f16", outfile=tmp_path / "out.gguf"),
        request_for("no-such-folder", "hf", target="all", outfile=tmp_path / "out"),
        request_for("no-such-folder", "gguf", target="q4_0", outfile=tmp_path / "out.gguf"),
    ):
        with pytest.raises(UnsupportedError, match="--verify"):
            convert(request, verify="drift")
    with pytest.raises(QGuardError, match="magic"):
        convert(request_for("no-such-folder", "q4_0"), verify="magic")


def test_functions_answer_as_the_commands_do(tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    request = request_for(tiny_base, "q4_0", seed=1, outfile=tmp_path / "out.gguf", keep_plain=True, threads=1)
    planned = dry_run(request)
    report = convert(request, verify="drift", verify_limit=4)
    assert_type(report, GgufReport)
    assert report.plain is not None
    assert report.verification is not None
    assert report.verification.measured.suites == {"drift": 4}
    assert {tensor.name: tensor.target_type for tensor in planned.tensors} == {
        tensor.name: tensor.ggml_type.name for tensor in inspect(report.outfile).tensors
    }
    assert to_document(inspect(report.outfile)) == cli(capfd, "inspect", report.outfile)
    found = diff(report.plain, report.outfile, base=tiny_base)
    assert found.only_code_bits
    assert to_document(found) == cli(capfd, "diff", report.plain, report.outfile, "--base", tiny_base)
    again = tmp_path / "again.gguf"
    flags = ["--to", "q4_0", "--seed", 1, "--threads", 1, "-o", again]
    document = cli(capfd, "convert", tiny_base, *map(str, flags))
    mine = to_document(report, scan=ScanGuard())
    assert mine.keys() - document.keys() == {"verification"}
    assert mine["tensors"] == document["tensors"]
    assert mine["sha256"]["output"] == document["sha256"]["output"]
    assert mine["schema_version"] == document["schema_version"]


def test_plan_and_apply_give_what_convert_gives(tiny_base: Path, tmp_path: Path) -> None:
    request = request_for(
        tiny_base, "q4_0", defense="ortho", seed=1, outfile=tmp_path / "out.gguf", keep_plain=True, check_loads=False
    )
    report = convert(request, scan=False)
    assert report.plain is not None
    planned = plan(
        PlanRequest(
            model=str(tiny_base),
            base=tiny_base,
            plain=report.plain,
            outfile=tmp_path / "plan.safetensors",
            defense=parse_defense("ortho"),
            seed=1,
        )
    )
    applied = apply(planned.outfile, report.plain, tmp_path / "applied.gguf")
    assert sum(applied.changed.values()) == planned.outcome.n_changed > 0
    assert diff(applied.outfile, report.outfile).codes_changed == 0


def test_verify_and_packs(tiny_base: Path, tmp_path: Path) -> None:
    candidate = tmp_path / "out.gguf"
    convert(request_for(tiny_base, "q8_0", outfile=candidate, check_loads=False), scan=False)
    outcome = verify(VerifyRequest(candidate, tiny_base, limit=2, threads=1))
    assert_type(outcome, Verification)
    assert [one.id for one in outcome.checks] == ["drift/mean-kl"]
    assert to_document(outcome)["verdict"] == outcome.verdict
    path = tmp_path / "pack.json"
    write_pack(baseline(BaselineRequest(tiny_base, limit=2, threads=1)), path)
    checked = check(CheckRequest(pack=read_pack(path), candidate=candidate, threads=1))
    assert [one.id for one in checked.checks] == ["drift/mean-kl"]
    assert outcome.drift is not None
    assert checked.drift is not None
    assert 0 <= checked.drift.candidate.mean_kl <= outcome.drift.candidate.mean_kl * 1.5 + 1e-6


def test_compare_takes_names_and_options(tiny_base: Path) -> None:
    rows = compare(request_for(tiny_base, "q4_0", threads=1), ["none", OrthoOptions(width=0.0)], texts=["abc " * 20])
    assert [row.defense.label for row in rows] == ["none", "ortho width=0.0"]
    assert rows[0].share_flipped == 0
    assert rows[1].share_flipped > 0
    twice = compare(request_for(tiny_base, "q4_0", threads=1), ["ortho"] * 2, texts=["abc " * 20])
    assert twice[0].fidelity == twice[1].fidelity  # one seed for all
    assert GgufFile(tiny_base).tensors  # and the base is left alone
