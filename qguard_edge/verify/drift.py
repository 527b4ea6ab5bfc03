"""How far the next-token distributions moved, in numbers that do not depend on the answers.

For every position of every text, with `p` of the base and `q` of the file: KL(p || q), whether both put the same token on
top, and log p(next) - log q(next) on the text's own next token (see `qguard_edge.runtimes.fidelity`). All models decode the same
token ids in step, a chunk of positions at a time, so memory is bounded by the chunk, whatever the text's length.

Three yardsticks stand beside the numbers:

* the **noise floor**: the base against itself, decoded once more in chunks of another size. Anything near
  it is the machine's rounding, not the file's;
* the **band**: mean KL that is usual for the type, an orientation only. llama.cpp's published values are for an 8 B
  model; small models lie several times higher, so the band reaches from half to eight times the published value;
* the **limit** that the verdict uses: above it the file is not a version of the base any more. It is a guard against
  broken files, whose answers would otherwise look harmless, and not a mark for quality.

Positions of one text are not independent, so intervals come from resampling whole texts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qguard_edge.runtimes.fidelity import FloatArray, compare_distributions
from qguard_edge.verify.results import Band, Check, CheckKind, Drift, DriftNumbers, Histogram, Verdict
from qguard_edge.verify.runner import Runner, RunnerFactory
from qguard_edge.verify.statistics import bootstrap_means

CHUNK = 128
NOISE_CHUNK = 32
NOISE_DOCUMENTS = 6
LEAST_DOCUMENTS = 8
"""With fewer, nothing follows for other texts: a bootstrap over three texts is three texts."""
MOST_NATS = 80.0
"""Losses are cut here, so that a file that gives a token no probability at all still has finite numbers."""
EDGES = tuple(round(-8.0 + 0.25 * i, 2) for i in range(41))

# Mean KL of a Llama-3-8B against its f16 on wikitext, from the README of llama.cpp's perplexity tool.
PUBLISHED: Mapping[str, float] = {
    "Q8_0": 0.0014,
    "Q6_K": 0.0055,
    "Q5_K_M": 0.011,
    "Q4_K_M": 0.031,
    "Q4_K_S": 0.043,
    "Q4_0": 0.072,
    "Q3_K_M": 0.10,
}
DEFAULT_LIMIT = 0.5
LOW_BIT_LIMIT = 2.0
_LOW_BIT = ("Q1", "Q2", "IQ1", "IQ2", "TQ")


@dataclass(frozen=True)
class DocumentDrift:
    """One file on one text.

    Attributes:
        kl: KL divergence per position, f64 `[n]`.
        same: whether the top token is the same, bool `[n]`.
        loss: log p(next) - log q(next), f64 `[n]`.
    """

    kl: npt.NDArray[np.float64]
    same: npt.NDArray[np.bool_]
    loss: npt.NDArray[np.float64]


def measure_documents(
    base: Path,
    others: Mapping[str, Path],
    documents: Sequence[Sequence[int]],
    factory: RunnerFactory,
    *,
    n_noise: int = NOISE_DOCUMENTS,
    at_once: int = 1,
) -> Iterator[dict[str, DocumentDrift]]:
    """Compare files with the base, text by text.

    Args:
        base: full-precision GGUF.
        others: role -> file.
        documents: token ids of each text, two or more.
        factory: loads the models.
        n_noise: the first so many texts are decoded by the base twice, for the noise floor.
        at_once: models that decode at the same time, each in a thread of this process that waits for it.

    Yields:
        Per text: role -> measurement; `noise` is the base against itself.
    """
    n_ctx = max(len(ids) for ids in documents)
    with ExitStack() as stack:

        def opened(path: Path, role: str, n_batch: int = CHUNK) -> Runner:
            return stack.enter_context(factory.open(path, n_ctx=n_ctx, n_batch=n_batch, role=role))

        full = opened(base, "base")
        models = {role: opened(path, role) for role, path in others.items()}
        again = opened(base, "base", NOISE_CHUNK) if n_noise else None
        each: Each = stack.enter_context(ThreadPoolExecutor(at_once)).map if at_once > 1 else map
        for number, ids in enumerate(documents):
            streams = {role: model.logits_chunks(ids[:-1]) for role, model in models.items()}
            if again is not None and number < n_noise:
                streams["noise"] = again.logits_chunks(ids[:-1])
            yield _compare({"base": full.logits_chunks(ids[:-1]), **streams}, ids, each)


Each = Callable[[Callable[[Iterator[FloatArray]], FloatArray], Iterable[Iterator[FloatArray]]], Iterable[FloatArray]]


def _compare(streams: Mapping[str, Iterator[FloatArray]], ids: Sequence[int], each: Each) -> dict[str, DocumentDrift]:
    """Decode in step and compare chunk by chunk; the first stream is the base's."""
    _, *others = streams
    parts: dict[str, list[DocumentDrift]] = {role: [] for role in others}
    for start in range(0, len(ids) - 1, CHUNK):
        following = ids[start + 1 : start + 1 + CHUNK]
        expected, *found = each(partial(_take, count=len(following)), streams.values())
        for role, logits in zip(others, found, strict=True):
            compared = compare_distributions(expected, logits, following)
            loss = np.clip(np.nan_to_num(compared.loss, nan=MOST_NATS), -MOST_NATS, MOST_NATS)
            kl = np.clip(np.nan_to_num(compared.kl, nan=MOST_NATS, posinf=MOST_NATS), 0.0, MOST_NATS)
            parts[role].append(DocumentDrift(kl, compared.same, loss))
    return {
        role: DocumentDrift(
            np.concatenate([part.kl for part in pieces]),
            np.concatenate([part.same for part in pieces]),
            np.concatenate([part.loss for part in pieces]),
        )
        for role, pieces in parts.items()
    }


def _take(stream: Iterator[FloatArray], *, count: int) -> FloatArray:
    """The next `count` rows of a stream of chunks."""
    first = next(stream)
    if len(first) == count:
        return first
    pieces = [first.copy()]
    while sum(len(piece) for piece in pieces) < count:
        pieces.append(next(stream).copy())
    return np.concatenate(pieces)


def summarise(parts: Sequence[DocumentDrift], seed: int = 0) -> DriftNumbers:
    """Numbers of one file over all texts, with bootstrap intervals over texts."""
    kl = np.concatenate([part.kl for part in parts])
    counts = np.array([len(part.kl) for part in parts], np.float64)
    means = bootstrap_means(np.array([part.kl.sum() for part in parts]), counts, seed)
    ratios = np.exp(bootstrap_means(np.array([part.loss.sum() for part in parts]), counts, seed))
    low, high = np.quantile(means, [0.025, 0.975])
    ratio_low, ratio_high = np.quantile(ratios, [0.025, 0.975])
    places = np.clip(np.log10(np.maximum(kl, 1e-30)), EDGES[0], EDGES[-1])
    return DriftNumbers(
        mean_kl=float(kl.mean()),
        mean_kl_low=float(low),
        mean_kl_high=float(high),
        kl_999=float(np.quantile(kl, 0.999)),
        same_top=float(np.concatenate([part.same for part in parts]).mean()),
        perplexity_ratio=float(np.exp(np.concatenate([part.loss for part in parts]).mean())),
        perplexity_ratio_low=float(ratio_low),
        perplexity_ratio_high=float(ratio_high),
        histogram=Histogram(EDGES, tuple(int(count) for count in np.histogram(places, EDGES)[0])),
    )


def band_of(file_type: str | None) -> Band | None:
    """What is usual for a type; None where nothing was published."""
    if file_type is None or file_type not in PUBLISHED:
        return None
    value = PUBLISHED[file_type]
    source = "half to eight times llama.cpp's published value for Llama-3-8B; small models lie high in it"
    return Band(file_type, value / 2, value * 8, source)


def limit_of(file_type: str | None, max_kl: float | None = None) -> tuple[float, str]:
    """Highest mean KL that passes, and where it comes from: the user's `max_kl`, or else the type."""
    if max_kl is not None:
        return max_kl, "--max-kl"
    if file_type and file_type.startswith(_LOW_BIT):
        return LOW_BIT_LIMIT, f"the default for types below 3 bits ({file_type})"
    band = band_of(file_type)
    if band and band.high > DEFAULT_LIMIT:
        return band.high, f"the upper end of the band of {file_type}"
    return DEFAULT_LIMIT, "the default"


def judge_drift(numbers: DriftNumbers, n_documents: int, limit: float) -> tuple[Verdict, int | None]:
    """Verdict on the mean KL, and how many texts it would take to decide (None: decided)."""
    if n_documents < LEAST_DOCUMENTS:
        return Verdict.INCONCLUSIVE, LEAST_DOCUMENTS
    if numbers.mean_kl_high <= limit:
        return Verdict.PASS, None
    if numbers.mean_kl_low > limit:
        return Verdict.FAIL, None
    half = (numbers.mean_kl_high - numbers.mean_kl_low) / 2
    gap = max(abs(numbers.mean_kl - limit), 1e-3 * limit)
    return Verdict.INCONCLUSIVE, int(np.ceil(n_documents * (half / gap) ** 2)) + 1


@dataclass(frozen=True)
class DriftRules:
    """What drift is judged by.

    Attributes:
        file_type: of the candidate, for the limit and the band; None where it is unknown.
        max_kl: highest mean KL that passes; None: by the file type.
        seed: of the bootstrap.
        lower_bound: the KL is a lower bound, because only the likeliest tokens are known.
    """

    file_type: str | None
    max_kl: float | None = None
    seed: int = 0
    lower_bound: bool = False


def drift_and_check(
    measured: Mapping[str, Sequence[DocumentDrift]], noise_floor: float, rules: DriftRules
) -> tuple[Drift, Check]:
    """The drift of a candidate with its check.

    Args:
        measured: per role (`candidate`, perhaps `plain`) one measurement per text.
        noise_floor: mean KL of the base against itself.
        rules: limit and seed.
    """
    limit, source = limit_of(rules.file_type, rules.max_kl)
    numbers = {role: summarise(parts, rules.seed) for role, parts in measured.items()}
    candidate, plain, documents = numbers["candidate"], numbers.get("plain"), len(measured["candidate"])
    tokens = sum(len(part.kl) for part in measured["candidate"])
    verdict, needed = judge_drift(candidate, documents, limit)
    reason = (
        f"mean KL {candidate.mean_kl:.4g} ({candidate.mean_kl_low:.4g} to {candidate.mean_kl_high:.4g})"
        f"{', a lower bound,' if rules.lower_bound else ''} on {tokens} tokens of {documents} texts; "
        f"up to {limit:.4g} passes ({source})"
    )
    check = Check(
        suite="drift",
        name="mean-kl",
        title="Distance of the next-token distributions from the base's",
        kind=CheckKind.DRIFT,
        verdict=verdict,
        reason=reason + (f"; about {needed} texts would decide" if needed else ""),
        margin=limit,
        plain_verdict=judge_drift(plain, documents, limit)[0] if plain else None,
        prompts=documents,
        prompts_needed=needed,
    )
    return Drift(tokens, documents, candidate, plain, noise_floor, limit, source, band_of(rules.file_type)), check
