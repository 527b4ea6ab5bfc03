"""The shape of the tests themselves: where they lie, what they import, and that none of them looks away."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGES = ("quant_grids", "convert", "qguard_edge")
LOOK_AWAY = {"skip", "skipif", "importorskip", "xfail"}
# A test may stay away where the system cannot do what it asks about; a missing package is a failure.
MAY_SKIP = {
    "convert/test_cores.py": "not every system has affinity masks",
    "qguard_edge/runtimes/test_llama.py": "only Linux tells a child that its parent is gone",
}


def files(pattern: str = "*.py") -> list[Path]:
    return sorted(TESTS.rglob(pattern))


def name_of(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


def modules_of(path: Path) -> set[str]:
    """Every module that a file imports, and every name it imports from one, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def attributes_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_nothing_imports_a_test_or_a_conftest(path: Path) -> None:
    own = {part for part in modules_of(path) if part.partition(".")[0] in {"tests", "conftest"} or part.startswith("test_")}
    last = {name.rpartition(".")[2] for name in own}
    assert not {name for name in last if name.startswith("test_") or name == "conftest"}, "put it into tests/helpers"
    modules = {".".join(name.split(".")[:2]) for name in own if name.startswith("tests.")}
    if path.parent.name == "hostile" or path.name == "test_hostile.py":
        modules -= {"tests.hostile"}  # a program, that its own test starts
    assert modules <= {"tests.helpers"}


def test_tests_lie_where_their_package_does() -> None:
    for path in files("test_*.py"):
        folder = path.parent.relative_to(TESTS)
        if folder != Path():
            assert folder.parts[0] in PACKAGES, name_of(path)
            assert (ROOT / folder / "__init__.py").is_file(), f"{name_of(path)}: there is no package {folder}"


def test_helpers_hold_no_tests() -> None:
    for path in (TESTS / "helpers").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_what_is_missing_is_a_failure(path: Path) -> None:
    """`pytest.importorskip` and its like would hide a missing dependency, all of which `.[dev]` installs."""
    if path != Path(__file__) and name_of(path) not in MAY_SKIP:
        assert not attributes_of(path) & LOOK_AWAY


def test_the_exceptions_are_still_needed() -> None:
    for name in MAY_SKIP:
        assert attributes_of(TESTS / name) & LOOK_AWAY, name
