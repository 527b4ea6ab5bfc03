"""What a scan can find: one rule per code, and findings that carry numbers.

Codes are stable: QG1xx sanity, QG2xx outliers, QG3xx boxes, QG4xx the dose curve. The severity is the finding's, for one
rule may find something suspicious in one model and something dangerous in another:

* *info*: worth knowing, and common among honest models;
* *suspicious*: unusual; look closer (`--deep`, `verify`), ask where the model comes from;
* *dangerous*: no clean model that the limits were measured on comes near it; `convert` refuses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding matters; ordered by `rank`."""

    INFO = "info"
    SUSPICIOUS = "suspicious"
    DANGEROUS = "dangerous"

    @property
    def rank(self) -> int:
        """0, 1, 2."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Rule:
    """A kind of finding.

    Attributes:
        code: QG and three digits.
        title: a few words.
        meaning: what it may be a mark of, and what else it may come from.
        advice: what to do.
    """

    code: str
    title: str
    meaning: str
    advice: str


_LOOK = "Ask where the model comes from; scan with --deep; convert with a defense and verify the file."

RULES: Mapping[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule(
            "QG101",
            "weights that are not numbers",
            "A weight is NaN or infinite: the file is broken, or was made to break what reads it.",
            "Get the model again from its source.",
        ),
        Rule(
            "QG102",
            "dead tensors",
            "Every weight of a matrix is zero. Some honest models have such matrices; a truncated or damaged file has them too.",
            "Compare with the model's source.",
        ),
        Rule(
            "QG103",
            "mixed precision",
            "Some matrices are stored in another precision than most. Box attacks need fp32, so an fp32 matrix among bf16 ones "
            "deserves a look; most models that mix precisions do so for honest reasons.",
            "Compare with the model's source.",
        ),
        Rule(
            "QG104",
            "tensors that no defense reaches",
            "The type stores these tensors in a form whose rounding cannot be chosen.",
            "Choose another type; `convert` refuses without --allow-unprotected.",
        ),
        Rule(
            "QG105",
            "box fingerprints could not be told",
            "Too few weights with enough precision, or a type whose codes are shared by several weights: boxes would not show.",
            "Scan the checkpoint in its original precision, or use --deep.",
        ),
        Rule(
            "QG106",
            "the weights were on a grid before",
            "Many weights of a chunk have exactly equal magnitudes: the model was quantized once and written out again. Honest "
            "conversions of quantized models look like this. Box fingerprints cannot be read from such weights.",
            "Scan the model that it was made from.",
        ),
        Rule(
            "QG201",
            "outliers that blot out their neighbours",
            "In many chunks of 32 weights the largest is more than 16 times the median, so a 4-bit type rounds at least half of "
            "the chunk to zero: the mark of outlier injection (arXiv 2605.15152). What is rounded away exists in full precision "
            "only, and no rounding defense brings it back.",
            "Do not quantize these tensors: convert with --keep-flagged-f16 and --verify, or leave the model.",
        ),
        Rule(
            "QG301",
            "weights piled up at a wall",
            "Far more weights than elsewhere lie at one and the same place of their quantization cells: the mark of a "
            "repair that was held inside boxes (arXiv 2405.18137, 2505.23786). Full precision may be clean because it was "
            "repaired to be, and the file of this type would then be the model before the repair.",
            _LOOK,
        ),
        Rule(
            "QG302",
            "a part of the cell is empty",
            "Almost no weights lie in a band of their quantization cells that untouched weights fill: the mark of boxes with a "
            "margin, such as the 0.4 step of ELQ on INT8 (arXiv 2405.18137).",
            _LOOK,
        ),
        Rule(
            "QG303",
            "an excess of weights on their levels",
            "More weights than expected lie almost exactly on a level of this type. Quantization-aware training, and fine-tuning "
            "a model that had been quantized, leave this mark, and so do error boxes (arXiv 2505.23786).",
            _LOOK,
        ),
        Rule(
            "QG401",
            "rounding differently brings the model closer",
            "On a clean model the distance to full precision rises when rounding errors are turned away from llama.cpp's. Here "
            "it falls: the plain rounding itself carries structure, as a payload does that lives in it.",
            "Convert with `ortho` or `quantguard` and verify; do not ship plain files of this model.",
        ),
    )
}


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        code: of its rule.
        severity: of this finding.
        message: what was found, one sentence with its numbers.
        file_type: the type it was found for, or None.
        tensors: names, the most telling first.
        numbers: the statistics behind it.
    """

    code: str
    severity: Severity
    message: str
    file_type: str | None = None
    tensors: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def rule(self) -> Rule:
        """What kind of finding this is."""
        return RULES[self.code]


def worst(findings: tuple[Finding, ...]) -> Severity | None:
    """The highest severity, None without findings."""
    return max((finding.severity for finding in findings), key=lambda severity: severity.rank, default=None)


def in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    """The most severe first, then by code and type."""
    return tuple(sorted(findings, key=lambda f: (-f.severity.rank, f.code, f.file_type or "")))
