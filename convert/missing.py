"""Is the model that the user named there at all, and llama.cpp? Asked before anything heavy is loaded, so nothing here is."""

import re
from importlib.util import find_spec
from pathlib import Path

from quant_grids.errors import QGuardError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class SourceError(QGuardError):
    """The model cannot be found or fetched."""


LLAMA_MISSING = (
    "llama.cpp is missing (the Python package llama-cpp-python): with a C and C++ compiler at hand, `pip install "
    "llama-cpp-python` builds it in some four minutes; docs/howto/install.md says what to do without a compiler"
)


class LlamaMissingError(QGuardError):
    """llama-cpp-python is not installed."""


def require_llama() -> None:
    """Say at once that llama.cpp is missing; it is not loaded for that.

    Raises:
        LlamaMissingError: it is.
    """
    if find_spec("llama_cpp") is None:
        raise LlamaMissingError(LLAMA_MISSING)


def check_exists(model: str) -> None:
    """Say at once, before anything is loaded, that a model is not there; a hub id is passed over.

    Raises:
        SourceError: neither a path nor something that could be a hub id.
    """
    if not Path(model).expanduser().exists() and not looks_like_hub_id(model):
        raise missing(model)


def missing(model: str) -> SourceError:
    """What is said of a model that is not there."""
    path = Path(model).expanduser()
    here = "" if path.is_absolute() else " (the path starts in the present folder)"
    if path.suffix.lower() == ".gguf" or "/" not in model.strip("/") or path.is_absolute() or path.parent.is_dir():
        kind = "file" if path.suffix else "file or folder"
        return SourceError(f"there is no {kind} {model!r}{here}; a hub id has the form OWNER/NAME")
    return SourceError(
        f"{model!r} is not a folder, not a .gguf file and not a hub id of the form OWNER/NAME; check the path"
    )


def looks_like_hub_id(model: str) -> bool:
    """Whether a text is OWNER/NAME as the hub allows it, and not the path of something in a folder that exists."""
    if _HUB_ID.fullmatch(model) is None or "--" in model or ".." in model:
        return False
    owner, _, name = model.partition("/")
    return not Path(owner).exists() and not name.lower().endswith((".gguf", ".safetensors", ".json", ".bin", ".txt"))
