"""Verification as the last step of a conversion: a file that fails does not get its name."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qguard_edge.progress import Progress
from qguard_edge.verify.results import Outcome
from qguard_edge.verify.verifier import VerifyRequest, select_suites, verify

Gate = Callable[[Path, Path, Path, Path], Outcome]
"""Called with the finished candidate, the base, llama.cpp's own file, and the candidate's final name."""


def make_gate(suites: Sequence[str], threads: int, n_gpu_layers: int, progress: Progress) -> Gate:
    """A gate that asks built-in suites.

    Args:
        suites: their names; `all` for every one.
        threads: 0 for all cores.
        n_gpu_layers: layers on the GPU.
        progress: told about each stage.

    Raises:
        SuiteError: an unknown name; now, not after the conversion.
    """
    chosen = select_suites(suites)

    def gate(candidate: Path, base: Path, naive: Path, outfile: Path) -> Outcome:
        request = VerifyRequest(
            candidate=candidate,
            reference=base,
            naive=naive,
            suites=chosen,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            names={"candidate": outfile.name, "naive": f"{outfile.stem}.reference{outfile.suffix}"},
        )
        return verify(request, progress)

    return gate


def rejected_path(outfile: Path) -> Path:
    """The name of a file that failed: `NAME.rejected.gguf`."""
    return outfile.with_name(f"{outfile.stem}.rejected{outfile.suffix}")
