"""A conversion's report as JSON values; files by name only, never by path."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qguard_edge.conversion.report import (
    ConversionReport,
    FolderReport,
    GgufReport,
    MatrixRounding,
    MovedGgufReport,
    PlanReport,
)
from qguard_edge.rounding.gguf import TensorRounding
from qguard_edge.rounding.gguf_moved import MovedTensor


def report_document(report: ConversionReport) -> dict[str, Any]:
    """The document of any conversion: what all have in common, and what its kind of output adds."""
    document = {**_common(report), **_own(report)}
    if report.verification is not None:
        from qguard_edge.verify.results import to_document

        verdict = report.verification.verdict
        document["status"] = verdict.value if verdict.exit_code else "ok"
        document["verification"] = to_document(report.verification)
    return document


def _common(report: ConversionReport) -> dict[str, Any]:
    return {
        "status": "ok",
        "outfile": report.outfile.name,
        "defense": report.defense.name if report.defense else None,
        "params": asdict(report.defense) if report.defense else None,
        "seed": report.seed,
        "bytes": {"base": report.base_bytes, "output": report.out_bytes},
        "sha256": dict(report.hashes),
        "seconds": {name: round(value, 3) for name, value in report.seconds.items()},
        "warnings": list(report.warnings),
        "load_check": asdict(report.loaded) if report.loaded else None,
        "learned": asdict(report.learned) if report.learned else None,
        "activations": asdict(report.activations) if report.activations else None,
        "entropy_bits": report.entropy_bits,
    }


def _own(report: ConversionReport) -> Mapping[str, Any]:
    match report:
        case GgufReport():
            return _gguf(report)
        case FolderReport():
            return _folder(report)
        case MovedGgufReport():
            return _moved(report)
        case PlanReport():
            return {
                "tensors": report.tensors,
                "weights": report.weights,
                "share_flipped": report.outcome.n_changed / max(report.weights, 1),
                "alignment": report.outcome.alignment,
            }
    return {}


def _gguf(report: GgufReport) -> dict[str, Any]:
    return {
        "plain": report.plain.name if report.plain else None,
        "mmproj": report.mmproj.name if report.mmproj else None,
        "file_type": report.file_type.name,
        "bits_per_weight": report.bits_per_weight,
        "fidelity": asdict(report.beside_plain) | {"summary": report.beside_plain.sentence} if report.beside_plain else None,
        "protected_share": report.coverage.protected_share if report.coverage else None,
        "unprotected": [tensor.name for tensor in report.coverage.unprotected] if report.coverage else [],
        "fallbacks": [asdict(fallback) for fallback in report.quantized.fallbacks] if report.quantized else [],
        "share_between_seeds": share_between_seeds(report.roundings),
        "tensors": [rounding_document(rounding, rounding.ggml_type.name) for rounding in report.roundings],
    }


def share_between_seeds(roundings: Sequence[TensorRounding]) -> float | None:
    """Share of the codes that another seed is expected to choose otherwise; None where that is not measured."""
    differing = sum(rounding.differing for rounding in roundings)
    return differing / sum(rounding.n_weights for rounding in roundings) if differing else None


def _folder(report: FolderReport) -> dict[str, Any]:
    return {
        "file_type": report.to.upper(),
        "targets": list(report.kinds),
        "reproduced": {kind: reproduced(of_kind(report, kind)) for kind in report.kinds},
        "moved_weights": report.moved_weights,
        "kept": {"tensors": report.kept_tensors, "weights": report.kept_weights, "skipped_modules": list(report.skipped)},
        "tensors": [
            {
                **rounding_document(rounding, rounding.kind.upper()),
                "given_up": rounding.given_up,
                "reproduced": reproduced([rounding]),
            }
            for rounding in report.roundings
        ],
    }


def _moved(report: MovedGgufReport) -> dict[str, Any]:
    return {
        "target": report.file_type.name,
        "reproduced": codes_as_chosen(report.tensors),
        "flips_reached": flips_reached(report.tensors),
        "tensors": [
            {
                "name": tensor.name,
                "type": tensor.ggml_type.name,
                "weights": tensor.n_weights,
                "flips_chosen": tensor.n_chosen,
                "weights_moved": tensor.n_moved,
                "flips_reached": tensor.reached,
                "reproduced": tensor.codes / tensor.n_weights,
                "alignment_chosen": rounding.outcome.alignment,
                "alignment": tensor.outcome.alignment,
                "added_squared_error": tensor.outcome.added_error,
            }
            for tensor, rounding in zip(report.tensors, report.chosen, strict=True)
        ],
    }


def rounding_document(rounding: MatrixRounding | TensorRounding, type_name: str) -> dict[str, Any]:
    """What was decided for one tensor, as JSON values."""
    outcome = rounding.outcome
    return {
        "name": rounding.name,
        "type": type_name,
        "weights": rounding.n_weights,
        "flips": outcome.n_changed,
        "share_flipped": outcome.n_changed / rounding.n_weights,
        "alignment_before": 1.0,
        "alignment": outcome.alignment,
        "added_squared_error": outcome.added_error,
        "entropy_bits": rounding.bits,
    }


def of_kind(report: FolderReport, kind: str) -> list[MatrixRounding]:
    """The matrices of one format."""
    return [rounding for rounding in report.roundings if rounding.kind == kind]


def reproduced(roundings: Sequence[MatrixRounding]) -> float | None:
    """Share of the chosen codes that the unmodified quantizer gave; None where that was not checked."""
    checked = [rounding for rounding in roundings if rounding.reproduced is not None]
    if not checked:
        return None
    return sum(rounding.reproduced or 0 for rounding in checked) / sum(rounding.n_weights for rounding in checked)


def codes_as_chosen(tensors: Sequence[MovedTensor]) -> float:
    """Share of all codes that llama.cpp gives as chosen."""
    weights = sum(tensor.n_weights for tensor in tensors)
    return sum(tensor.codes for tensor in tensors) / weights if weights else 1.0


def flips_reached(tensors: Sequence[MovedTensor]) -> float:
    """Share of the moved weights that have their new code."""
    moved = sum(tensor.n_moved for tensor in tensors)
    return sum(tensor.reached for tensor in tensors) / moved if moved else 1.0
