"""Compare defenses on a user's own model: what each costs in fidelity, measured in llama.cpp. The utility side only.

Whether a defense *works* needs a backdoored model; `qguard-edge lab` makes those. Here every defense converts the same base
with the same seed, and its file is compared with full precision on a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from convert.base_gguf import write_base
from convert.scratch import scratch_folder
from convert.source import resolve_source
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.rounding.gguf import total_outcome
from qguard_edge.runtimes.fidelity import Fidelity, measure_fidelity

SPENT = ("activations", "learn", "choose and write", "requantize")  # stages of a conversion that are the defense's own


@dataclass(frozen=True)
class DefenseRow:
    """One defense on one model and type.

    Attributes:
        defense: the rule and its options.
        alignment: share of plain rounding's error vector that is left, over all protected tensors.
        share_flipped: codes that differ from plain rounding's, per protected weight.
        added_error: relative change of the squared error.
        fidelity: distance to full precision on the text.
        seconds: wall time of the defense itself, without the plain quantization.
    """

    defense: DefenseOptions
    alignment: float
    share_flipped: float
    added_error: float
    fidelity: Fidelity
    seconds: float


def compare_defenses(
    request: GgufRequest,
    defenses: Sequence[DefenseOptions],
    texts: Sequence[str],
    *,
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> list[DefenseRow]:
    """Convert a model with each defense and measure every result.

    Args:
        request: model, type and options; its output name and defense are not used; a seed of None means 0, the same
            for all.
        defenses: to compare, in this order.
        texts: to measure on.
        max_tokens: of each text.
        progress: told about each stage.

    Raises:
        QGuardError: what the conversions raise; nothing is left behind.
    """
    progress = progress or NoProgress()
    if request.seed is None:
        request = replace(request, seed=0)
    source = resolve_source(request.model, request.revision)
    with scratch_folder() as work:
        base = source.path
        if not source.is_gguf:
            base = work / "base.gguf"
            write_base(
                source,
                base,
                base_type=request.base_type,
                pre=request.pre,
                converter=request.converter,
                progress=progress,
                trust_remote_code=request.trust_remote_code,
            )
        rows = []
        for defense in defenses:
            out = work / "candidate.gguf"
            asked = replace(
                request,
                model=str(base),
                outfile=str(out),
                defense=defense,
                overwrite=True,
                keep_plain=False,
                check_loads=False,
            )
            report = convert_model(asked, progress)
            progress.stage(f"Measuring {defense.name} in llama.cpp", len(texts), "texts")
            threads = request.options.threads
            fidelity = measure_fidelity(base, out, texts, max_tokens=max_tokens, threads=threads, progress=progress)
            total = total_outcome(report.roundings)
            weights = sum(rounding.n_weights for rounding in report.roundings)
            spent = sum(report.seconds.get(stage, 0.0) for stage in SPENT)
            rows.append(
                DefenseRow(defense, total.alignment, total.n_changed / max(weights, 1), total.added_error, fidelity, spent)
            )
    return rows
