"""qguard-edge: quantize language models with rounding decisions that keep conditioned backdoors asleep.

The names in `__all__` are the public Python API, described in docs/python.md. Each is imported from its own module when it is
first asked for, so that `import qguard_edge` and `qguard-edge --help` stay quick.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.diff import FileDifference
    from convert.inspection import GgufSummary
    from convert.quantizer import QuantizeOptions
    from qguard_edge.api import (
        apply,
        baseline,
        check,
        compare,
        convert,
        diff,
        dry_run,
        inspect,
        plan,
        scan,
        to_document,
        verify,
    )
    from qguard_edge.compare.defenses import DefenseRow
    from qguard_edge.conversion.dry_run import DryRun
    from qguard_edge.conversion.outputs.plan import ApplyReport
    from qguard_edge.conversion.report import ConversionReport, FolderReport, GgufReport, MovedGgufReport, PlanReport
    from qguard_edge.conversion.request import FolderRequest, GgufRequest, MovedGgufRequest, PlanRequest
    from qguard_edge.conversion.request_for import request_for
    from qguard_edge.defenses.options import DefenseOptions, parse_defense
    from qguard_edge.learned.calibration import CalibrationOptions
    from qguard_edge.packs.check import CheckRequest
    from qguard_edge.packs.pack import Pack, read_pack, write_pack
    from qguard_edge.packs.record import BaselineRequest
    from qguard_edge.progress import NoProgress, Progress
    from qguard_edge.runtimes.fidelity import read_texts
    from qguard_edge.scan.findings import Finding, Severity
    from qguard_edge.scan.guard import RefusedError, ScanGuard
    from qguard_edge.scan.results import Scan
    from qguard_edge.scan.run import ScanRequest
    from qguard_edge.verify.checks import Margins
    from qguard_edge.verify.choose import choose_suites
    from qguard_edge.verify.results import Check, Verdict, Verification
    from qguard_edge.verify.suites.base import Suite
    from qguard_edge.verify.verifier import VerifyRequest
    from quant_grids.errors import QGuardError

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

_FUNCTIONS = "qguard_edge.api"
_CLASSES = {
    "convert.diff": "FileDifference",
    "convert.inspection": "GgufSummary",
    "convert.quantizer": "QuantizeOptions",
    "qguard_edge.compare.defenses": "DefenseRow",
    "qguard_edge.conversion.dry_run": "DryRun",
    "qguard_edge.conversion.outputs.plan": "ApplyReport",
    "qguard_edge.conversion.report": "ConversionReport FolderReport GgufReport MovedGgufReport PlanReport",
    "qguard_edge.conversion.request": "FolderRequest GgufRequest MovedGgufRequest PlanRequest",
    "qguard_edge.conversion.request_for": "request_for",
    "qguard_edge.defenses.options": "DefenseOptions parse_defense",
    "qguard_edge.learned.calibration": "CalibrationOptions",
    "qguard_edge.packs.check": "CheckRequest",
    "qguard_edge.packs.pack": "Pack read_pack write_pack",
    "qguard_edge.packs.record": "BaselineRequest",
    "qguard_edge.progress": "NoProgress Progress",
    "qguard_edge.runtimes.fidelity": "read_texts",
    "qguard_edge.scan.findings": "Finding Severity",
    "qguard_edge.scan.guard": "RefusedError ScanGuard",
    "qguard_edge.scan.results": "Scan",
    "qguard_edge.scan.run": "ScanRequest",
    "qguard_edge.verify.checks": "Margins",
    "qguard_edge.verify.choose": "choose_suites",
    "qguard_edge.verify.results": "Check Verdict Verification",
    "qguard_edge.verify.suites.base": "Suite",
    "qguard_edge.verify.verifier": "VerifyRequest",
    "quant_grids.errors": "QGuardError",
}
"""Module -> the public names that it defines; all others are defined in `_FUNCTIONS`."""


class _Package(ModuleType):
    """This module; its `scan`, `verify` and `compare` are functions, whether or not the packages of these names are imported.

    When a subpackage is imported, Python makes it an attribute of its parent; here that would hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


if not TYPE_CHECKING:  # to a type checker, a `__getattr__` would make every misspelt name an `Any`

    def __getattr__(name: str) -> Any:
        """A public name that is asked for the first time."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        home = next((module for module, names in _CLASSES.items() if name in names.split()), _FUNCTIONS)
        globals()[name] = found = getattr(import_module(home), name)
        return found


def __dir__() -> list[str]:
    """All public names, imported or not."""
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
