"""Is the hardened file better or worse than plain rounding? A short measurement at the end of a conversion."""

from pathlib import Path

from convert.gguf_file import GgufModel
from qguard_edge.conversion.outputs.base import Job
from qguard_edge.runtimes.fidelity import BesidePlain, measure_beside_plain
from quant_grids.errors import QGuardError

SMALL = 500_000_000
"""Weights of a model up to which three runs over a short text cost little beside any conversion."""
EVERY = 6
"""Of the texts that `verify` measures drift on, one in so many is enough for the summary of a conversion."""


def costs_little(job: Job, base: GgufModel) -> bool:
    """Whether three runs over a short text are little beside this conversion: it runs the model on far more, or it is small."""
    return job.defense.wants_inputs or sum(tensor.n_weights for tensor in base.tensors.values()) <= SMALL


def beside_plain(job: Job, base: GgufModel, made: Path, plain: Path, threads: int) -> tuple[BesidePlain | None, str]:
    """Measure a hardened file and plain rounding against their base in llama.cpp; what fails here fails no conversion.

    Returns:
        The distances, and a warning for people, or an empty text.
    """
    from qguard_edge.verify.verifier import built_in_texts  # needs llama.cpp, which a plan does without

    texts = built_in_texts()[::EVERY]
    job.progress.stage("Measuring the distance to full precision", len(texts), "texts")
    with job.clock.stage("fidelity"):
        try:
            return measure_beside_plain(base.path, made, plain, texts, threads=threads, progress=job.progress), ""
        except QGuardError as error:
            return None, f"the distance to full precision was not measured: {error}"
