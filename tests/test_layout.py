"""The shape of the project itself: which package may import which, and what `--help` may not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "quant_grids": {"quant_grids"},
    "convert": {"quant_grids", "convert"},
    "qguard_edge": {"quant_grids", "convert", "qguard_edge"},
}
HOMES = {
    # fragile dependency -> the modules that may import it
    "llama_cpp": {
        "convert/quantize_worker.py",
        "qguard_edge/llama_runtime.py",
        "qguard_edge/runtimes/activations_worker.py",
        "qguard_edge/runtimes/ggml_tensor.py",
    },
    "bitsandbytes": {"convert/bnb_check.py"},
    "transformers": {"qguard_edge/lab/hf_models.py", "qguard_edge/hf_runtime.py"},
}


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_import_direction(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = imports_of(path) & (set(ALLOWED) | {"tests", "scripts"})
        assert ours <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {ours - ALLOWED[package]}"


@pytest.mark.parametrize("dependency", HOMES)
def test_fragile_dependencies_have_one_home(dependency: str) -> None:
    users = set()
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            if dependency in imports_of(path):
                users.add(str(path.relative_to(ROOT)))
    assert users <= HOMES[dependency]


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from qguard_edge.cli import run\n"
        "assert run(['convert', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'gguf', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--to" in done.stdout
