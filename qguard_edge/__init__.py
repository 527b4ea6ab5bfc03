"""qguard-edge: quantize language models with rounding decisions that keep conditioned backdoors asleep.

The names in `__all__` are the public Python API (docs/python.md). They are loaded on first use, from `qguard_edge.api`, so
that `import qguard_edge` stays quick.
"""

# ruff: noqa: F403, F405 - type checkers find the names in api.__all__; a test holds that list to this one

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qguard_edge.api import *

__version__ = "0.1.0"

__all__ = [
    "ApplyReport",
    "BaselineRequest",
    "CalibrationOptions",
    "Check",
    "CheckRequest",
    "ConversionReport",
    "DefenseOptions",
    "DefenseRow",
    "DryRun",
    "FileDifference",
    "Finding",
    "FolderReport",
    "FolderRequest",
    "GgufReport",
    "GgufRequest",
    "GgufSummary",
    "Margins",
    "MovedGgufReport",
    "MovedGgufRequest",
    "NoProgress",
    "Pack",
    "PlanReport",
    "PlanRequest",
    "Progress",
    "QGuardError",
    "QuantizeOptions",
    "RefusedError",
    "Scan",
    "ScanGuard",
    "ScanRequest",
    "Severity",
    "Suite",
    "Verdict",
    "Verification",
    "VerifyRequest",
    "__version__",
    "apply",
    "baseline",
    "check",
    "choose_suites",
    "compare",
    "convert",
    "diff",
    "dry_run",
    "inspect",
    "parse_defense",
    "plan",
    "read_pack",
    "read_texts",
    "request_for",
    "scan",
    "to_document",
    "verify",
    "write_pack",
]


class _Package(ModuleType):
    """This module; `scan`, `verify` and `compare` are its functions, also after the packages of these names were imported.

    Python sets a subpackage as an attribute of its parent when it is imported, which would hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    """A public name, loaded when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module("qguard_edge.api"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
