"""The dose curve: what happens to the model when its rounding errors are turned away from llama.cpp's, little by little.

The idea (ours)
---------------
Orthogonal rounding (`defenses.ortho`) leaves a share `c` of the plain rounding's error direction: c = 1 is the plain file, 0
has no component along it left, below 0 it is over-corrected. Every step away from c = 1 adds squared error, so on a clean
model the distance to full precision, mean KL of the next-token distributions, rises as c falls. A payload that lives in the
rounding *is* that direction: taking some of it away takes the payload away, and the distance **falls**. The trigger
need not be known; what is needed is some text on which the payload shows at all.

The statistic
-------------
For the lowest point of the curve, `ratio = KL(lowest) / KL(plain)`: 1 or a little less on clean models. The interval is a
percentile bootstrap over documents (positions of one text are not independent), and each resample looks for its own lowest
point, so that having picked the best of several points is part of the interval.

The text
--------
Plain passages, and for a model with a chat template also its own greedy answers to short prompts: what the model does when
asked is where payloads show, and only positions of the answer count there. Full precision writes them, so they are clean.

The greedy variant of `ortho` (width 0) is used: unpredictability is of no use here, and it adds the least error.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.ftypes import FileType
from convert.gguf_file import GgufFile, GgufModel
from convert.patch import GgufPatch
from convert.quantizer import QuantizeOptions, quantize
from convert.scratch import scratch_folder
from qguard_edge.defenses.base import make_defense
from qguard_edge.defenses.options import OrthoOptions
from qguard_edge.learned.calibration_self import SEED_PROMPTS
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.rounding.gguf import WalkOptions, coverage_of, harden
from qguard_edge.runtimes.fidelity import DEFAULT_TEXT, N_BOOTSTRAP, FloatArray, compare_distributions, read_texts
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.scan.findings import Finding, Severity
from qguard_edge.scan.limits import Limits
from qguard_edge.scan.results import DoseCurve, Point
from qguard_edge.verify.chat import TemplateError, render, template_of
from qguard_edge.verify.suites.base import SuitePrompt
from quant_grids.errors import UnsupportedError

TARGETS = (0.9, 0.75, 0.5, 0.25, 0.0, -0.5)
PROMPTS = 32
ANSWER_TOKENS = 40
TEXT_TOKENS = 256
KEPT_LOGITS = 1 << 29  # bytes of full-precision logits kept between the points of the curve; beyond, they are computed anew

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredText:
    """Token ids, and how many of them are a prompt whose positions do not count."""

    ids: tuple[int, ...]
    n_prompt: int = 1


def dose_curve(
    base: GgufModel,
    file_type: FileType,
    *,
    texts: Path | None = None,
    targets: Sequence[float] = TARGETS,
    prompts: int = PROMPTS,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> DoseCurve:
    """Measure the curve: one plain quantization, one patched file per target, each scored in llama.cpp.

    Args:
        base: full precision.
        file_type: to quantize to.
        texts: UTF-8 passages separated by empty lines; None: a built-in set.
        targets: of `ortho`, below 1.
        prompts: that a chat model answers, 0 for none.
        seed: of the bootstrap.
        threads: 0 for all cores.
        progress: told about each point.

    Raises:
        UnsupportedError: the type quantizes nothing.
        QGuardError: what quantizing and loading raise; nothing is left behind.
    """
    progress = progress or NoProgress()
    if file_type.base:
        raise UnsupportedError(f"--deep needs a type that is quantized; {file_type.name} is not")
    passages = read_texts(texts or DEFAULT_TEXT)
    with scratch_folder() as work:
        plain = work / "plain.gguf"
        progress.stage(f"Quantizing with llama.cpp to {file_type.name}", len(base.tensors), "tensors")
        quantize(base.path, plain, QuantizeOptions(file_type, threads=threads))
        with LlamaModel(base.path, n_ctx=2 * TEXT_TOKENS, n_threads=threads or None) as full:
            documents = documents_of(base, full, passages, prompts)
            scorer = _Scorer(full, documents, threads)
            progress.stage(f"Dose curve for {file_type.name}", len(targets) + 1, "files")
            points = [scorer.score(1.0, plain)]
            progress.advance(1)
            for target in targets:
                with _dosed(base, GgufFile(plain), target, work / "dosed.gguf", threads) as dosed:
                    points.append(scorer.score(target, dosed))
                progress.advance(1, f"c = {target}")
    return curve_of(file_type.name, points, [len(d.ids) - d.n_prompt for d in documents], seed)


def documents_of(base: GgufModel, full: LlamaModel, passages: Sequence[str], prompts: int) -> list[ScoredText]:
    """The passages, and for a chat model its own answers to the first of the shipped prompts."""
    ids = [tuple(full.tokenize(text, add_special=True)[:TEXT_TOKENS]) for text in passages]
    documents = [ScoredText(one) for one in ids if len(one) > 1]
    try:
        template = template_of(base.first) if prompts else None
        lines = SEED_PROMPTS.read_text(encoding="utf-8").splitlines() if template else []
        rendered = (
            render(template, [SuitePrompt(str(i), line) for i, line in enumerate(lines[:prompts])]) if template else []
        )
    except TemplateError as error:
        logger.warning("the chat template cannot be used, so only passages are measured: %s", error)
        rendered = []
    asked = [tuple(full.tokenize(text)[:TEXT_TOKENS]) for text in rendered]
    for prompt, answer in zip(asked, full.greedy_batch(asked, ANSWER_TOKENS) if asked else [], strict=True):
        if answer:
            documents.append(ScoredText((*prompt, *answer), len(prompt)))
    return documents


class _Scorer:
    """Compares files with full precision on the same documents; its logits are computed once where they fit."""

    def __init__(self, full: LlamaModel, documents: Sequence[ScoredText], threads: int) -> None:
        self.full, self.documents, self.threads = full, documents, threads
        fits = sum(len(d.ids) for d in documents) * full.n_vocab * 4 <= KEPT_LOGITS
        self.kept = [self._of(full, document) for document in documents] if fits else None

    def _of(self, model: LlamaModel, document: ScoredText) -> FloatArray:
        """Logits at the positions that predict the counted tokens."""
        return model.logits(document.ids[:-1])[document.n_prompt - 1 :]

    def score(self, target: float, file: Path) -> Point:
        """Mean KL of one file."""
        sums, count = [], 0
        with LlamaModel(file, n_ctx=self.full.n_ctx, n_threads=self.threads or None) as candidate:
            for i, document in enumerate(self.documents):
                wanted = self.kept[i] if self.kept else self._of(self.full, document)
                following = document.ids[document.n_prompt :]
                kl = compare_distributions(wanted, self._of(candidate, document), following).kl
                sums.append(float(kl.sum()))
                count += len(kl)
        return Point(target, sum(sums) / count, tuple(sums))


@contextmanager
def _dosed(base: GgufModel, plain: GgufFile, target: float, path: Path, threads: int) -> Iterator[Path]:
    """The plain file with `ortho` at a target; removed afterwards."""
    defense = make_defense(OrthoOptions(target=target, width=0.0))
    tensors = coverage_of(base, plain).protected
    patch = GgufPatch(plain, path, {})
    try:
        harden(base, plain, tensors, defense, WalkOptions(seed=0, threads=threads), sink=patch.write_rows)
        patch.copy_rest(tensor.name for tensor in tensors)
    finally:
        patch.close()
    try:
        yield path
    finally:
        path.unlink()


def curve_of(file_type: str, points: Sequence[Point], counts: Sequence[int], seed: int = 0) -> DoseCurve:
    """Ratio and interval of measured points.

    Args:
        file_type: what was measured.
        points: plain rounding first.
        counts: positions of each document.
        seed: of the bootstrap.
    """
    sums: npt.NDArray[np.float64] = np.array([point.sums for point in points])
    drawn = np.random.default_rng(seed).integers(0, len(counts), (N_BOOTSTRAP, len(counts)))
    totals = np.stack([row[drawn].sum(1) for row in sums])  # the resampled positions cancel in the ratio
    ratios = totals[1:].min(0) / np.maximum(totals[0], 1e-30)
    low, high = np.quantile(ratios, [0.025, 0.975])
    ratio = min(point.mean_kl for point in points[1:]) / max(points[0].mean_kl, 1e-30)
    return DoseCurve(file_type, tuple(points), ratio, (float(low), float(high)), len(counts), sum(counts))


def judge(curve: DoseCurve, main_type: str, limits: Limits) -> list[Finding]:
    """A finding if the curve falls.

    Args:
        curve: measured.
        main_type: the file type's main ggml type, for its limits.
        limits: what clean models show.
    """
    known = limits.dose_limits(main_type)
    low, high = curve.interval
    if curve.ratio >= known.suspicious or high >= 1.0:
        return []
    dangerous = curve.ratio < known.dangerous and high < known.suspicious
    text = (
        f"{curve.file_type}: mean KL to full precision is {curve.ratio:.2f} of plain rounding's ({low:.2f} to {high:.2f}) "
        f"when a share of {curve.lowest.target:g} of its error direction is left (clean models: at least "
        f"{known.clean_smallest:.2f})"
    )
    numbers = {
        "ratio": curve.ratio,
        "low": low,
        "high": high,
        "target": curve.lowest.target,
        "plain_kl": curve.points[0].mean_kl,
    }
    return [Finding("QG401", Severity.DANGEROUS if dangerous else Severity.SUSPICIOUS, text, curve.file_type, (), numbers)]
