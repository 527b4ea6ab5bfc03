"""Files that are what their name says: what llama.cpp stores as another type than the one that was asked for.

A type of blocks of 256 weights needs rows of a multiple of 256; where they are not, llama.cpp falls back to a larger type, and a
file called Q4_K_M may hold Q5_0 and Q8_0 for the most part.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from convert.gguf_file import GgufModel
from convert.quantizer import Fallback, QuantizeOptions, quantize
from quant_grids.errors import UnsupportedError

WORTH_A_WARNING = 0.1
"""Share of the weights from which on name and content part; below it the table of fallbacks says enough."""
_FITTING = "types with blocks of 32 fit such rows: --to q8_0, or --to q4_0 --pure"


def require_no_fallback(base: GgufModel, options: QuantizeOptions, work: Path) -> None:
    """Ask llama.cpp what it would do, without doing it, and refuse if a tensor would fall back to another type.

    Args:
        base: to be quantized.
        options: as for the real run.
        work: an existing folder; nothing is written to it.

    Raises:
        UnsupportedError: naming the first such tensor.
    """
    found = quantize(base.path, work / "unused.gguf", replace(options, imatrix=None), dry_run=True).fallbacks
    if found:
        first = found[0]
        raise UnsupportedError(
            f"--no-fallback: llama.cpp would store {len(found)} tensors, {_percent(_share(found, base))} of the weights, as "
            f"another type; {first.tensor!r} has rows of {first.columns}, so that {first.wanted} becomes {first.got}; {_FITTING}"
        )


def fallback_warning(found: Sequence[Fallback], base: GgufModel, name: str, bits: float) -> list[str]:
    """A sentence, if so much fell back that the type's name says something else than the file.

    Args:
        found: what fell back.
        base: the model.
        name: of the type that was asked for.
        bits: per weight, of the file.
    """
    share = _share(found, base)
    if share < WORTH_A_WARNING:
        return []
    return [
        f"{_percent(share)} of the weights fell back to another type, for their rows are no multiple of the block: the file is "
        f"called {name} and has {bits:.2f} bits per weight; --no-fallback refuses this, and {_FITTING}"
    ]


def _share(found: Sequence[Fallback], base: GgufModel) -> float:
    return sum(base.tensors[one.tensor].n_weights for one in found if one.tensor in base.tensors) / max(base.n_weights, 1)


def _percent(share: float) -> str:
    return f"{share:.0%}"
