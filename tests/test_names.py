"""The words of the project: one class per name, and one word per thing."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("quant_grids", "convert", "qguard_edge")
OLD_WORD = re.compile(r"\bnaive|naive_", re.IGNORECASE)
OLD_NAMES_OF_OPTIONS = "qguard_edge/cli/verify.py"


def sources() -> dict[str, str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for name, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{name}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_what_llama_cpp_makes_by_itself_is_called_plain() -> None:
    assert [name for name, source in sources().items() if OLD_WORD.search(source)] == [OLD_NAMES_OF_OPTIONS]
