"""Verification as the last step of a conversion: a file that fails does not get its name."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qguard_edge.progress import Progress
from qguard_edge.verify.results import Verification
from qguard_edge.verify.suites.base import Suite
from qguard_edge.verify.verifier import VerifyRequest, verify

Gate = Callable[[Path, Path, Path, Path], Verification]
"""Called with the finished candidate, the base, plain quantization of it (a folder: itself), and the candidate's final name."""


def make_gate(
    suites: Sequence[Suite],
    threads: int,
    n_gpu_layers: int,
    progress: Progress,
    *,
    device: str = "auto",
    load_in: str | None = None,
    limit: int | None = None,
) -> Gate:
    """A gate that verifies with suites, and measures the drift.

    Args:
        suites: to ask.
        threads: 0 for all cores.
        n_gpu_layers: layers on the GPU.
        progress: told about each stage.
        device: auto, cpu or cuda, for folders.
        load_in: for folders: the format in which bitsandbytes rounds those of full precision, the base excepted.
        limit: prompts per suite, and texts, at most; None: all.
    """

    def gate(candidate: Path, base: Path, plain: Path, outfile: Path) -> Verification:
        request = VerifyRequest(
            candidate=candidate,
            base=base,
            plain=plain,
            suites=tuple(suites),
            limit=limit,
            threads=threads,
            n_gpu_layers=n_gpu_layers,
            device=device,
            load_in=load_in,
            names={
                "candidate": outfile.name,
                "plain": f"{base.name} ({load_in})" if load_in else f"{outfile.stem}.plain{outfile.suffix}",
            },
        )
        return verify(request, progress)

    return gate
