"""Find QVec's lambda on a text: convert with a few values, measure each in llama.cpp, keep the closest to full precision.

The paper chooses lambda by a short search on unlabelled data and does not give the score; ours is the mean KL divergence to
full precision. A small lambda may win on a clean model: then the search gives what fidelity alone would choose, and
the default is what to fall back on (see docs/results.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qguard_edge.compare.defenses import DefenseRow, compare_defenses
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.defenses.options import QVecOptions
from qguard_edge.progress import Progress

STRENGTHS = (0.1, 0.25, 0.5)


@dataclass(frozen=True)
class QVecSearch:
    """A finished search.

    Attributes:
        best: the options with the winning lambda.
        rows: one per lambda, in the order of the search.
    """

    best: QVecOptions
    rows: tuple[DefenseRow, ...]

    @property
    def summary(self) -> str:
        """One sentence: the winner and every candidate's mean KL."""
        tried = ", ".join(f"{_strength(row)}: {row.fidelity.mean_kl:.4f}" for row in self.rows)
        return f"qvec: lambda {self.best.strength} is closest to full precision (mean KL on the text, {tried})"


def search_strength(
    request: GgufRequest,
    texts: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    progress: Progress | None = None,
) -> QVecSearch:
    """Choose lambda for a conversion.

    Args:
        request: whose defense is QVec; its mode is kept.
        texts: to measure on.
        strengths: lambdas to try.
        progress: told about each stage.

    Raises:
        QGuardError: what the conversions raise.
    """
    options = request.defense
    assert isinstance(options, QVecOptions)
    candidates = [replace(options, strength=strength) for strength in strengths]
    rows = compare_defenses(request, candidates, texts, progress=progress)
    best = min(rows, key=lambda row: row.fidelity.mean_kl)
    return QVecSearch(replace(options, strength=_strength(best)), tuple(rows))


def _strength(row: DefenseRow) -> float:
    assert isinstance(row.defense, QVecOptions)
    return row.defense.strength
