"""The type that a model's weights were trained for, where they lie on its levels: what `convert` makes without `--to`."""

from convert.source import resolve_source
from qguard_edge.progress import Progress
from qguard_edge.scan.limits import load_limits
from qguard_edge.scan.positions import CLOSED_FORM
from qguard_edge.scan.scanner import Levels, Walk, levels_of, on_grids
from qguard_edge.scan.tensors import is_matrix, open_model
from quant_grids.errors import UnsupportedError

MOST = 0.5
"""Share of the matrices that must lie on the levels: the embedding of a model that was trained for a type often does not."""


def trained_for(model: str, revision: str | None, threads: int, progress: Progress) -> Levels:
    """The type on whose levels most matrices of a model lie; one pass over its weights.

    Args:
        model: folder, hub id or .gguf file.
        revision: of a hub id.
        threads: 0 for one per core.
        progress: told the number of weights done.

    Raises:
        UnsupportedError: there is none, so that the user must name a type.
        QGuardError: the model cannot be read.
    """
    source, limits = resolve_source(model, revision), load_limits()
    with open_model(source, need_base=False, progress=progress) as opened:
        parts = Walk(opened, CLOSED_FORM).run(threads, progress)
    matrices = [part for part in parts if is_matrix(part.tensor)]
    found = levels_of(on_grids(matrices, limits))
    if found is None or found.matrices < MOST * len(matrices):
        raise UnsupportedError(
            f"which type? Give --to, for example --to q4_k: the weights of {source.name} were trained for none that can be "
            f"seen in them (looked at: {', '.join(CLOSED_FORM)})"
        )
    return found
