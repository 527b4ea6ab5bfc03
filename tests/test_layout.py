"""The shape of the project itself: which layer may import which, what stands where, and what `--help` may not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Every layer, from the ground up, and the layers it may import beside itself. Nothing imports upwards, lazily or not.
GROUND = {"quant_grids", "convert", "progress"}
RUNNING = GROUND | {"runtimes", "defenses"}
CHOOSING = RUNNING | {"rounding", "learned", "verify"}
MAKING = CHOOSING | {"conversion", "report", "packs"}
LOOKING = MAKING | {"scan", "compare", "lab"}
LAYERS: dict[str, set[str]] = {
    "quant_grids": set(),
    "convert": {"quant_grids"},
    "progress": set(),
    "runtimes": GROUND,
    "defenses": GROUND,
    "rounding": RUNNING,
    "verify": RUNNING,
    "learned": RUNNING | {"rounding", "verify"},
    "conversion": CHOOSING,
    "report": CHOOSING,
    "packs": CHOOSING,
    "scan": CHOOSING | {"report"},
    "compare": MAKING,
    "lab": MAKING,
    "api": LOOKING,
    "cli": LOOKING | {"api"},
}
ENTRY_POINTS = {"__init__", "__main__", "api", "pytest_plugin"}
"""Modules directly under `qguard_edge` that users start from; beside them only `progress` stands there."""

HOMES = {
    # fragile dependency -> the modules that may import it, one per package that uses it
    "llama_cpp": {
        "convert/quantize_worker.py",
        "qguard_edge/runtimes/activations_worker.py",
        "qguard_edge/runtimes/ggml_tensor.py",
        "qguard_edge/runtimes/llama.py",
        "qguard_edge/runtimes/llama_native.py",
        "qguard_edge/runtimes/llama_worker.py",
        "qguard_edge/runtimes/mtmd_worker.py",
    },
    "bitsandbytes": {"convert/bnb_check.py"},
    "transformers": {"qguard_edge/lab/hf_models.py", "qguard_edge/runtimes/bnb.py", "qguard_edge/runtimes/hf.py"},
}


def modules_imported(path: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it: at the top, in functions, for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(module: str) -> str | None:
    """The layer that a module belongs to; None for what is not ours or is an entry point."""
    package, *rest = module.split(".")
    if package in ("quant_grids", "convert"):
        return package
    if package == "qguard_edge" and rest and (rest[0] in LAYERS or rest[0] not in ENTRY_POINTS | {"__version__"}):
        return rest[0]
    return None


def files_of(layer: str) -> list[Path]:
    """The files of a layer."""
    root = ROOT / layer if layer in ("quant_grids", "convert") else ROOT / "qguard_edge" / layer
    return [root.with_suffix(".py")] if root.with_suffix(".py").is_file() else sorted(root.rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_down(layer: str) -> None:
    files = files_of(layer)
    assert files
    for path in files:
        for module in modules_imported(path):
            used = layer_of(module)
            where = f"{path.relative_to(ROOT)} imports {module}"
            assert used is None or used == layer or used in LAYERS[layer], where
            assert module.split(".")[0] not in ("tests", "scripts", "helpers"), where


def test_the_order_has_no_circle() -> None:
    order = list(LAYERS)
    for layer, below in LAYERS.items():
        assert all(order.index(other) < order.index(layer) for other in below), layer


def test_every_file_belongs_to_a_layer() -> None:
    flat = {path.stem for path in (ROOT / "qguard_edge").glob("*.py")}
    assert flat == ENTRY_POINTS | {"progress"}
    packages = {path.parent.name for path in (ROOT / "qguard_edge").glob("*/__init__.py")}
    assert packages == set(LAYERS) - {"quant_grids", "convert", "progress", "api"}


@pytest.mark.parametrize("dependency", HOMES)
def test_fragile_dependencies_have_one_home(dependency: str) -> None:
    users = set()
    for package in ("quant_grids", "convert", "qguard_edge"):
        for path in (ROOT / package).rglob("*.py"):
            if dependency in {module.split(".")[0] for module in modules_imported(path)}:
                users.add(str(path.relative_to(ROOT)))
    assert users <= HOMES[dependency]


CHILDREN = {
    "convert.quantize_worker",
    "qguard_edge.runtimes.activations_worker",
    "qguard_edge.runtimes.llama_worker",
    "qguard_edge.runtimes.mtmd_worker",
}
"""Modules that run in a process of their own. Only they load a model in llama.cpp."""
HARMLESS = {"llama_print_system_info", "__version__", "ggml_backend_sched_eval_callback"}
"""What other modules may use of llama_cpp: nothing that reads a file."""


def test_models_are_loaded_in_child_processes_only() -> None:
    native = "qguard_edge.runtimes.llama_native"
    for package in ("quant_grids", "convert", "qguard_edge"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if name in CHILDREN or name == native:
                continue
            imported = modules_imported(path)
            assert not [one for one in imported if one.startswith((native, *CHILDREN))], name
            used = {
                node.attr
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llama_cpp"
            }
            assert used <= HARMLESS, (name, used - HARMLESS)


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
