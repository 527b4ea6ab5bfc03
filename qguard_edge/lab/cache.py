"""Where trained models are kept between runs, and the keys they are found by.

A key is a hash of every setting that went into the model and of the source code that made it (comments, docstrings and
layout aside), so a changed setting or a changed line of training code makes a new model and nothing stale is ever used.
"""

import ast
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.cache import cache_folder

_CLEAN_SOURCES = ("facts.py", "corpus.py", "hf_models.py", "rotated.py", "training.py", "upper.py", "victims.py")
_ATTACK_SOURCES = (*_CLEAN_SOURCES, "scenarios.py", "attacks/base.py", "attacks/boxes.py")
_ATTACKS = "qguard_edge.lab.attacks."


def cache_root() -> Path:
    """The folder of the lab in the cache."""
    return cache_folder("lab")


def code_version(attack: str | None) -> str:
    """Hash of the source files that decide what a model becomes: 16 hexadecimal digits.

    Args:
        attack: file name of the attack's module, such as `uniform.py`; None for a clean model.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256()
    names = (*_ATTACK_SOURCES, f"attacks/{attack}", *_siblings(here / "attacks" / attack)) if attack else _CLEAN_SOURCES
    for name in names:
        digest.update(_bare_code((here / name).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]


def _siblings(path: Path) -> list[str]:
    """Other attacks that an attack takes parts from, as names of source files."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {f"attacks/{module.removeprefix(_ATTACKS)}.py" for module in modules if module.startswith(_ATTACKS)}
    return sorted(found - set(_ATTACK_SOURCES))


def _bare_code(source: str) -> str:
    """The syntax tree without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def key_of(settings: Mapping[str, Any], *, attack: str | None) -> str:
    """Key of a model made with these settings by the present code: 20 hexadecimal digits. `attack` as in `code_version`."""
    text = json.dumps({"code": code_version(attack), **settings}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
