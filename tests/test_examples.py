"""The examples of docs/examples, as a user runs them: another folder, another process, the tiny model."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert.diff import compare_files, qguard_metadata
from convert.gguf_file import GgufFile

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def run_example(name: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=600)


def test_convert_and_check(tiny_folder: Path, tmp_path: Path) -> None:
    done = run_example("convert_and_check.py", tmp_path, tiny_folder, "tiny.gguf")
    assert done.returncode in (0, 1, 3), done.stderr
    lines = done.stdout.splitlines()
    found = compare_files(tmp_path / "tiny.plain.gguf", tmp_path / "tiny.gguf")
    assert found.codes_changed > 0
    assert f"{found.codes_changed} codes differ from tiny.plain.gguf; only code bits: True" in lines
    verdict = {0: "pass: ", 1: "fail: ", 3: "inconclusive: "}[done.returncode]
    assert any(line.startswith(verdict) for line in lines)
    assert any("drift/mean-kl" in line for line in lines)
    assert qguard_metadata(GgufFile(tmp_path / "tiny.gguf"))["defense"] == "feedback"


def test_gate_passes_on_what_the_verification_says(tiny_folder: Path, tmp_path: Path) -> None:
    done = run_example(
        "gate_in_ci.py",
        tmp_path,
        tiny_folder,
        "out.gguf",
        "report.json",
        "--type",
        "q6_k",
        "--suites",
        "drift",
        "--limit",
        "4",
    )
    document = json.loads((tmp_path / "report.json").read_text())
    verdict = document["verification"]["verdict"]
    assert done.returncode == {"pass": 0, "fail": 1, "inconclusive": 3}[verdict], done.stderr
    assert document["schema_version"] == 2
    assert document["scan"]["kept"] == []
    assert document["verification"]["measured"]["suites"]["drift"] == 4
    assert (tmp_path / ("out.rejected.gguf" if verdict == "fail" else "out.gguf")).is_file()


def test_gate_refuses_what_the_scan_calls_dangerous(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    done = run_example("gate_in_ci.py", tmp_path, broken, "out.gguf", "report.json")
    assert done.returncode == 1, done.stderr
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["status"] == "refused"
    assert "QG101" in {finding["code"] for finding in document["findings"] if finding["severity"] == "dangerous"}
    assert not list(tmp_path.glob("*.gguf"))


def test_gate_says_why_it_could_not_be_run(tmp_path: Path) -> None:
    done = run_example("gate_in_ci.py", tmp_path, "no-such-folder", "out.gguf", "report.json", "--type", "q4_9")
    assert done.returncode == 2, done.stderr
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["status"] == "error"
    assert "q4_9" in document["error"]


def test_compare_defenses(tiny_folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("The quick brown fox jumps over the lazy dog.\n\nWhat is the capital of France? Paris.\n")
    done = run_example("compare_defenses.py", tmp_path, tiny_folder, texts, "result.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "result.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_name = {row["defense"]: row for row in rows}
    assert list(by_name) == ["none", "ortho", "ortho width=1.0", "flipguard"]
    assert float(by_name["none"]["share flipped"]) == 0
    assert float(by_name["none"]["alignment"]) == pytest.approx(1)
    assert abs(float(by_name["ortho"]["alignment"])) < 0.1
    for row in rows:
        assert float(row["low"]) <= float(row["mean KL"]) <= float(row["high"])
        assert row["defense"] in done.stdout


def test_every_example_has_a_test() -> None:
    source = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name == "tiny_model.py" or f'"{path.name}"' in source, path.name
