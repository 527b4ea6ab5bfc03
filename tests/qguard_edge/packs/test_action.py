"""The GitHub action: its script with the action's own environment, and no input pasted into a script."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import qguard_edge

ROOT = Path(qguard_edge.__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a `qguard-edge` on the path, as pip would install it."""
    command = tmp_path / "bin" / "qguard-edge"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m qguard_edge "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run_script(folder: Path, **inputs: str) -> tuple[int, dict[str, str], str]:
    output = folder / "output"
    output.touch()
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_OUTPUT": str(output),
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "MARGIN": "0.02",
        "REPORTS": "qguard-report",
        "QGUARD_THREADS": "1",
        **inputs,
    }
    script = ["bash", str(ROOT / "scripts" / "action_check.sh")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    lines = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return done.returncode, lines, done.stdout + done.stderr


def action() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    return read


def test_the_script_checks_and_reports(folder: Path, tiny_base: Path) -> None:
    pack = Path(__file__).parent / "data" / "pack-3.json"
    (folder / "model one.gguf").write_bytes(tiny_base.read_bytes())
    made = {"CANDIDATE": "model one.gguf", "BASELINE": str(pack)}
    code, output, said = run_script(folder, **made)
    assert code == 3, said  # two prompts and one text decide nothing
    assert re.search(r"^qguard-edge: no check fails, [^;]+; Not decided: ", said, re.MULTILINE)
    assert "Not decided:" in said
    assert output == {"verdict": "inconclusive", "sarif": "qguard-report/report.sarif"}
    names = {path.name for path in (folder / "qguard-report").iterdir()}
    assert names == {"report.html", "junit.xml", "report.sarif", "report.md", "result.json"}
    assert json.loads((folder / "qguard-report" / "result.json").read_text())["verdict"] == "inconclusive"
    assert "Inconclusive" in (folder / "summary.md").read_text()
    code, _, said = run_script(folder, **made, FAIL_ON_INCONCLUSIVE="false")
    assert code == 0
    assert "::warning::" in said


def test_an_error_is_an_error(folder: Path) -> None:
    code, output, _ = run_script(folder, CANDIDATE="--help", BASELINE="none.json")
    assert code == 2
    assert output == {"verdict": "error"}


def test_inputs_are_never_part_of_a_script() -> None:
    steps = action()["runs"]["steps"]
    assert all("${{" not in step["run"] for step in steps)
    used = set(re.findall(r"inputs\.([\w-]+)", json.dumps(steps)))
    assert used == set(action()["inputs"])


def test_the_example_workflow_uses_inputs_and_outputs_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / "docs" / "examples" / "check-model.yml").read_text())
    (job,) = workflow["jobs"].values()
    (step,) = (step for step in job["steps"] if "qguard-edge" in step.get("uses", ""))
    assert set(step["with"]) <= set(action()["inputs"])
    outputs = set(re.findall(r"steps\.qguard\.outputs\.([\w-]+)", json.dumps(job)))
    assert outputs
    assert outputs <= set(action()["outputs"])
