"""What llama.cpp's converter can convert, read from its source without running it, and whether a llama.cpp knows the result."""

import ast
import importlib.util
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ForeignArchitecture:
    """An architecture of config.json that the converter takes.

    Attributes:
        name: in config.json.
        target: llama.cpp's name, "" where the source does not say it plainly.
    """

    name: str
    target: str


def architectures_of(script: Path) -> tuple[ForeignArchitecture, ...]:
    """The text models of a converter, by name; empty for a checkout whose converter is not split into `conversion/`."""
    folder = script.parent
    names = _target_names(folder)
    targets: dict[str, str] = {}
    for file in sorted((folder / "conversion").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                target = names.get(_model_arch(node), "")
                targets |= {name: target for name in _registered(node) if target or name not in targets}
    text = _text_models(folder / "conversion" / "__init__.py")
    return tuple(ForeignArchitecture(name, targets.get(name, "")) for name in sorted(text))


def runs_in_llama_cpp(targets: set[str]) -> set[str]:
    """Which of llama.cpp's architecture names the installed library has; without loading it."""
    spec = importlib.util.find_spec("llama_cpp")
    places = list(spec.submodule_search_locations or ()) if spec else []
    libraries = [file for place in places for file in (Path(place) / "lib").glob("*llama.*") if not file.is_symlink()]
    known: set[str] = set()
    for library in libraries:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # Without a zero in front: a linker keeps a name that ends another one ("bert") as the other's tail.
            known |= {name for name in targets if name and content.find(name.encode() + b"\0") >= 0}
    return known


def _target_names(folder: Path) -> dict[str, str]:
    """MODEL_ARCH members -> llama.cpp's names, from the `gguf` beside the script."""
    for place in (folder, folder / "gguf-py"):
        file = place / "gguf" / "constants.py"
        if file.is_file():
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found = (
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.AnnAssign) and _is_name(node.target, "MODEL_ARCH_NAMES")
            )
            for node in found:
                assert isinstance(node.value, ast.Dict)
                pairs = zip(node.value.keys, node.value.values, strict=True)
                return {
                    key.attr: str(value.value)
                    for key, value in pairs
                    if isinstance(key, ast.Attribute) and isinstance(value, ast.Constant)
                }
    return {}


def _text_models(file: Path) -> Iterator[str]:
    if not file.is_file():
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and _is_name(node.target, "TEXT_MODEL_MAP") and isinstance(node.value, ast.Dict):
            yield from (str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _model_arch(node: ast.ClassDef) -> str:
    """`X` of a class's line `model_arch = gguf.MODEL_ARCH.X`."""
    for line in node.body:
        if (
            isinstance(line, ast.Assign)
            and _is_name(line.targets[0], "model_arch")
            and isinstance(line.value, ast.Attribute)
        ):
            return line.value.attr
    return ""


def _registered(node: ast.ClassDef) -> Iterator[str]:
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute) and mark.func.attr == "register":
            yield from (str(name.value) for name in mark.args if isinstance(name, ast.Constant))
