"""How far a quantized file is from full precision: next-token distributions on text, measured in llama.cpp.

For every position of every text, with `p` the distribution of the full-precision model and `q` that of the candidate:

* KL(p || q) = sum_v p(v) (log p(v) - log q(v)), its mean and its 99.9th percentile over positions;
* the share of positions where both put the same token on top;
* the perplexity ratio, `exp(mean of log p(next) - log q(next))` on the text's own next tokens.

Both models get the same token ids. Logits are kept for one text at a time.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.reading import read_text
from qguard_edge.progress import NoProgress, Progress
from quant_grids.errors import QGuardError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
DEFAULT_TEXT = Path(__file__).parents[1] / "data" / "calibration.txt"
N_BOOTSTRAP = 2000
TINY = 1e-12
"""Nats; what a sum of KL is divided by at least."""
LARGEST_TEXT = 1 << 28  # bytes


class TextError(QGuardError):
    """The text to measure on cannot be used."""


@dataclass(frozen=True)
class Fidelity:
    """Distance to full precision.

    Attributes:
        mean_kl: mean KL divergence per token, in nats.
        mean_kl_interval: 95% bootstrap interval of the mean, resampling texts.
        kl_999: 99.9th percentile of the KL divergence.
        same_top: share of positions with the same most likely token.
        perplexity_ratio: candidate's perplexity over full precision's.
        n_tokens: positions measured.
        n_texts: texts measured.
    """

    mean_kl: float
    mean_kl_interval: tuple[float, float]
    kl_999: float
    same_top: float
    perplexity_ratio: float
    n_tokens: int
    n_texts: int


@dataclass(frozen=True)
class BesidePlain:
    """How far a hardened file is from full precision, and how far plain rounding is, on the same text.

    Attributes:
        hardened: of the hardened file.
        plain: of llama.cpp's own.
        factor: plain's mean KL over the hardened file's; above 1 the hardened file is nearer.
        factor_interval: its 95% bootstrap interval, resampling texts.
    """

    hardened: Fidelity
    plain: Fidelity
    factor: float
    factor_interval: tuple[float, float]

    @property
    def numbers(self) -> str:
        """Both distances, in words."""
        tokens = f"{self.plain.n_tokens} tokens of general text"
        return f"mean KL to full precision {self.hardened.mean_kl:.4f}, plain {self.plain.mean_kl:.4f}, on {tokens}"

    @property
    def sentence(self) -> str:
        """Whether hardening made the file better or worse, in one sentence."""
        low, high = self.factor_interval
        if low > 1:
            return f"nearer to full precision than plain rounding, by a factor of {self.factor:.1f} ({self.numbers})"
        if high < 1:
            return f"further from full precision than plain rounding, by a factor of {1 / self.factor:.1f} ({self.numbers})"
        return f"about as near to full precision as plain rounding ({self.numbers})"


def read_texts(path: Path) -> list[str]:
    """Texts of a UTF-8 file, separated by empty lines.

    Raises:
        TextError: the file is unreadable or empty.
    """
    try:
        content = read_text(path, LARGEST_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read the text {path.name} as UTF-8: {error}") from error
    texts = [part.strip() for part in content.split("\n\n") if part.strip()]
    if not texts:
        raise TextError(f"{path.name} holds no text")
    return texts


def log_softmax(logits: FloatArray) -> FloatArray:
    """Along the last axis; sums in f64."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    normalised: FloatArray = shifted - np.log(total).astype(np.float32)
    return normalised


@dataclass(frozen=True)
class _Positions:
    """One text's positions: KL, same top token, and log p(next) - log q(next)."""

    kl: npt.NDArray[np.float64]
    same: npt.NDArray[np.bool_]
    loss: npt.NDArray[np.float64]


def compare_distributions(full: FloatArray, candidate: FloatArray, following: Sequence[int]) -> _Positions:
    """Compare two models' logits `[n, n_vocab]` at the same positions; `following` are the n true next tokens."""
    p, q = log_softmax(full), log_softmax(candidate)
    kl = (np.exp(p) * (p - q)).sum(-1, dtype=np.float64)
    rows = np.arange(len(following))
    loss = p[rows, list(following)].astype(np.float64) - q[rows, list(following)]
    return _Positions(np.maximum(kl, 0.0), p.argmax(-1) == q.argmax(-1), loss)


def measure_fidelity(
    base: Path,
    candidate: Path,
    texts: Sequence[str],
    *,
    max_tokens: int = 512,
    threads: int = 0,
    progress: Progress | None = None,
) -> Fidelity:
    """Compare a candidate with its full-precision base on texts.

    Args:
        base: full-precision GGUF.
        candidate: quantized GGUF with the same tokenizer.
        texts: each measured by itself, cut at `max_tokens`.
        max_tokens: of each text.
        threads: llama.cpp threads, 0 for all cores.
        progress: told about each text.

    Raises:
        TextError: no text has two tokens.
    """
    (parts,) = _positions(base, [candidate], texts, max_tokens, threads, progress or NoProgress())
    return summarise(parts)


def measure_beside_plain(
    base: Path,
    hardened: Path,
    plain: Path,
    texts: Sequence[str],
    *,
    max_tokens: int = 512,
    threads: int = 0,
    progress: Progress | None = None,
) -> BesidePlain:
    """Compare a hardened file and plain rounding with their base, on the same texts; arguments as for `measure_fidelity`."""
    ours, theirs = _positions(base, [hardened, plain], texts, max_tokens, threads, progress or NoProgress())
    numerator, denominator = (np.array([part.kl.sum() for part in parts]) for parts in (theirs, ours))
    drawn = _resampled(len(ours), 0)
    ratios = numerator[drawn].sum(1) / np.maximum(denominator[drawn].sum(1), TINY)
    low, high = np.quantile(ratios, [0.025, 0.975])
    factor = float(numerator.sum() / max(float(denominator.sum()), TINY))
    return BesidePlain(summarise(ours), summarise(theirs), factor, (float(low), float(high)))


def _positions(
    base: Path, candidates: Sequence[Path], texts: Sequence[str], max_tokens: int, threads: int, progress: Progress
) -> list[list[_Positions]]:
    """Positions of every text, per candidate; the base runs once."""
    parts: list[list[_Positions]] = [[] for _ in candidates]
    from qguard_edge.runtimes.llama import LlamaModel  # whoever reads a report needs no llama.cpp

    with ExitStack() as stack:
        full, *others = [
            stack.enter_context(LlamaModel(path, n_ctx=max_tokens, n_threads=threads or None))
            for path in (base, *candidates)
        ]
        for text in texts:
            tokens = full.tokenize(text, add_special=True)[:max_tokens]
            if len(tokens) > 1:
                right = full.logits(tokens[:-1])
                for found, other in zip(parts, others, strict=True):
                    found.append(compare_distributions(right, other.logits(tokens[:-1]), tokens[1:]))
            progress.advance(1)
    if not parts[0]:
        raise TextError("no text has two tokens or more; there is nothing to measure on")
    return parts


def _resampled(n: int, seed: int) -> IntArray:
    """Bootstrap samples of `n` texts: int64 `[N_BOOTSTRAP, n]`."""
    return np.random.default_rng(seed).integers(0, n, (N_BOOTSTRAP, n))


def summarise(parts: Sequence[_Positions], seed: int = 0) -> Fidelity:
    """Summary over all positions, with a bootstrap interval over texts (positions of one text are not independent)."""
    kl = np.concatenate([part.kl for part in parts])
    sums = np.array([part.kl.sum() for part in parts])
    counts = np.array([len(part.kl) for part in parts])
    drawn = _resampled(len(parts), seed)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Fidelity(
        mean_kl=float(kl.mean()),
        mean_kl_interval=(float(low), float(high)),
        kl_999=float(np.quantile(kl, 0.999)),
        same_top=float(np.concatenate([part.same for part in parts]).mean()),
        perplexity_ratio=float(np.exp(np.concatenate([part.loss for part in parts]).mean())),
        n_tokens=len(kl),
        n_texts=len(parts),
    )
