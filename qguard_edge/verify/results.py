"""The outcome of a verification, as values that become JSON and come back.

    Verification
      |- checks      one per question: Check (security, utility or drift), each with its own verdict
      |    |- candidate, base, plain        Rate: share of answers that show the behaviour, with an interval
      |    |- difference, plain_difference  Difference: candidate (plain) minus base, paired by prompt
      |    |- findings                      unexpected words and phrases, with their corrected p-values
      |    `- evidence                      answers of both models side by side
      |- drift       distance of the next-token distributions: Drift, with a histogram and a noise floor
      |- tensors     codes chosen anew, per tensor, where the plain quantization was given too
      |- files       what was compared, by name and SHA-256, never by path
      |- measured    how: versions, processor, seeds, settings
      `- limits      what the verdict does not cover

The JSON is read back strictly: a missing, additional or mistyped field is an error. The JSON schema of this version is
`qguard_edge/data/schemas/verify-2.json`; a change of meaning raises `SCHEMA_VERSION` and adds a file beside it. No field
is ever NaN or infinite: JSON has no such numbers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from enum import StrEnum
from functools import cache
from typing import Any, Final, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from quant_grids.errors import FormatError

SCHEMA_VERSION: Final = 2
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class VerificationError(FormatError):
    """A text is not the JSON of an outcome of this schema version."""


class Verdict(StrEnum):
    """The result of a check, or of all of them together."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    @property
    def exit_code(self) -> int:
        """Of the command line: 0, 1 or 3."""
        return {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3}[self]


class CheckKind(StrEnum):
    """What a check is about."""

    SECURITY = "security"
    UTILITY = "utility"
    DRIFT = "drift"


@dataclass(frozen=True, config=_STRICT)
class Rate:
    """A share of answers with its 95% interval.

    Attributes:
        hits: answers that show the behaviour.
        n: answers that could be judged.
        low: lower end of the interval (Wilson; in sampled runs each prompt counts once).
        high: upper end.
    """

    hits: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself; 0 of nothing is 0."""
        return self.hits / self.n if self.n else 0.0


@dataclass(frozen=True, config=_STRICT)
class Difference:
    """Rate of one model minus rate of the base, on the same prompts.

    Attributes:
        value: the difference, -1..1.
        low: lower end of its interval; of a check that counts answers, the bound that a fail is judged by.
        high: upper end; the bound that a pass is judged by.
        n: prompts on which both could be judged.
        only_first: prompts where only the model shows the behaviour (for sampled runs: where it shows it more often).
        only_base: prompts where only the base does.
        confidence: two-sided coverage of the interval, such as 0.95.
        method: of the interval, in words.
    """

    value: float
    low: float
    high: float
    n: int
    only_first: int
    only_base: int
    confidence: float
    method: str


@dataclass(frozen=True, config=_STRICT)
class PhraseFinding:
    """A word or phrase that the candidate uses in significantly more answers than the base.

    Attributes:
        phrase: lower-case words; the longest phrase that stands in these very answers.
        candidate: answers of the candidate with it.
        base: answers of the base with it.
        plain: answers of the plain file with it; None without one.
        n: pairs of answers.
        p_value: exact one-sided McNemar test.
        adjusted_p: the same, corrected for the number of phrases that were tested.
        difference: of the shares, candidate minus base.
    """

    phrase: str
    candidate: int
    base: int
    plain: int | None
    n: int
    p_value: float
    adjusted_p: float
    difference: Difference


@dataclass(frozen=True, config=_STRICT)
class Evidence:
    """Answers to one prompt, side by side; text is cut at a fixed length.

    Attributes:
        prompt_id: of the prompt in its suite.
        prompt: its text, before the chat template.
        candidate: the candidate's answer.
        base: the base's answer.
        plain: the plain file's; None without one.
        candidate_hit: whether the candidate's shows the behaviour; None: could not be judged.
        base_hit: whether the base's does.
        plain_hit: whether the plain file's does.
        similarity: of candidate and base, 0 (nothing in common) to 1 (the same text).
    """

    prompt_id: str
    prompt: str
    candidate: str
    base: str
    plain: str | None
    candidate_hit: bool | None
    base_hit: bool | None
    plain_hit: bool | None
    similarity: float


@dataclass(frozen=True, config=_STRICT)
class Check:
    """One question with its verdict.

    Attributes:
        suite: it belongs to, such as `injection`.
        name: of the check within the suite, such as `discovery`; `suite/name` is unique in an outcome.
        title: the question, for people: one line.
        kind: security, utility or drift.
        verdict: pass, fail or inconclusive.
        reason: why, one sentence with the numbers.
        margin: difference that is still called no worse; for drift the highest mean KL that passes.
        candidate: rate of the behaviour; None for drift.
        base: rate of the base.
        plain: rate of the plain file; None without one.
        difference: candidate minus base.
        plain_difference: plain minus base: what an unprotected file would have got.
        plain_verdict: the verdict the plain file would have got; None without one.
        prompts: how many prompts were used.
        prompts_needed: roughly how many prompts it would take to decide; None when decided, or when more would not help.
        findings: of discovery, the strongest first.
        evidence: where the answers differ most, hits first.
        decided_at: prompts after which the verdict was reached; None when it is inconclusive.
    """

    suite: str
    name: str
    title: str
    kind: CheckKind
    verdict: Verdict
    reason: str
    margin: float
    candidate: Rate | None = None
    base: Rate | None = None
    plain: Rate | None = None
    difference: Difference | None = None
    plain_difference: Difference | None = None
    plain_verdict: Verdict | None = None
    prompts: int = 0
    prompts_needed: int | None = None
    findings: tuple[PhraseFinding, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    decided_at: int | None = None

    @property
    def id(self) -> str:
        """`suite/name`."""
        return f"{self.suite}/{self.name}"


@dataclass(frozen=True, config=_STRICT)
class Histogram:
    """Positions by their KL divergence, on a logarithmic axis.

    Attributes:
        edges: base-10 logarithms of the bin edges, ascending; what lies outside is in the first or last bin.
        counts: positions per bin, one fewer than edges.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, config=_STRICT)
class DriftNumbers:
    """Distance of one file's next-token distributions from the base's.

    Attributes:
        mean_kl: mean KL(base || file) per token, in nats.
        mean_kl_low: lower end of its 95% interval (bootstrap over documents).
        mean_kl_high: upper end.
        kl_999: 99.9th percentile over tokens.
        same_top: share of tokens where both put the same token on top.
        perplexity_ratio: perplexity of the file over the base's.
        perplexity_ratio_low: lower end of its 95% interval (bootstrap over documents).
        perplexity_ratio_high: upper end.
        histogram: of KL over tokens.
    """

    mean_kl: float
    mean_kl_low: float
    mean_kl_high: float
    kl_999: float
    same_top: float
    perplexity_ratio: float
    perplexity_ratio_low: float
    perplexity_ratio_high: float
    histogram: Histogram


@dataclass(frozen=True, config=_STRICT)
class Band:
    """What is usual for a type: an orientation, not a limit.

    Attributes:
        file_type: llama.cpp's name, such as Q4_K_M.
        low: mean KL, lower end.
        high: mean KL, upper end.
        source: where the numbers come from.
    """

    file_type: str
    low: float
    high: float
    source: str


@dataclass(frozen=True, config=_STRICT)
class Drift:
    """Token-level distances on texts.

    Attributes:
        tokens: positions measured.
        documents: texts measured.
        candidate: of the candidate.
        plain: of the plain file; None without one.
        noise_floor: mean KL of the base against itself, measured a second time: what the machine alone adds.
        limit: highest mean KL that passes.
        limit_source: where the limit comes from, in words.
        band: usual mean KL of the candidate's type; None where unknown.
    """

    tokens: int
    documents: int
    candidate: DriftNumbers
    plain: DriftNumbers | None
    noise_floor: float
    limit: float
    limit_source: str
    band: Band | None


@dataclass(frozen=True, config=_STRICT)
class TensorChange:
    """One tensor of the candidate against the plain file.

    Attributes:
        name: of the tensor.
        type: ggml type.
        weights: in the tensor.
        flips: codes that differ from the plain file's.
        alignment: share of the plain error direction that is left; None for tensors without rounding.
    """

    name: str
    type: str
    weights: int
    flips: int
    alignment: float | None


@dataclass(frozen=True, config=_STRICT)
class FileFacts:
    """A file that took part.

    Attributes:
        role: candidate, base, plain, suite or text.
        name: file name, never a path.
        sha256: of its bytes, lower-case hexadecimal (of a split model: of all shards in order).
        size: in bytes.
        file_type: llama.cpp's name of its type; None for files that are not models.
        architecture: of a model.
        qguard: its `qguard.*` metadata as text; empty when qguard-edge did not make it.
    """

    role: Literal["candidate", "base", "plain", "suite", "text"]
    name: str
    sha256: str
    size: int
    file_type: str | None = None
    architecture: str | None = None
    qguard: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Measured:
    """How it was measured: what is needed to repeat it.

    Attributes:
        versions: of qguard-edge, python, llama-cpp-python, ...
        system: llama.cpp's own line on processor features and build flags.
        machine: operating system and processor architecture.
        settings: of the run: threads, context, parallel sequences, layers on the GPU, extra buffers, new tokens, ...
        suites: prompts used, per suite.
        samples: answers per prompt; 1 with temperature 0 is greedy.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling and of the bootstrap.
        chat_template: SHA-256 of the template the prompts were rendered with; None: prompts were used as they are.
        seconds: wall time of each stage.
        tokens_per_second: generated tokens over generation time, per file role.
    """

    versions: Mapping[str, str]
    system: str
    machine: str
    settings: Mapping[str, str | int | float | bool | None]
    suites: Mapping[str, int]
    samples: int
    temperature: float
    seed: int
    chat_template: str | None
    seconds: Mapping[str, float]
    tokens_per_second: Mapping[str, float]


@dataclass(frozen=True, config=_STRICT)
class Verification:
    """Everything a verification found.

    Attributes:
        schema_version: of this data model.
        verdict: fail when a check fails, else inconclusive when one is inconclusive or none was made, else pass.
        summary: one sentence for people.
        checks: in the order of the report.
        drift: distance of the distributions; None when the drift suite was not run.
        tensors: per tensor, when the plain file was given and has the same layout.
        files: that took part.
        measured: how.
        limits: what the verdict does not cover, one sentence each.
        warnings: what a reader should know, one sentence each.
        advice: what to do now, one sentence; empty in results of older versions.
        ended: why no more prompts were asked, one sentence; empty in results of older versions.
    """

    schema_version: Literal[2]
    verdict: Verdict
    summary: str
    checks: tuple[Check, ...]
    drift: Drift | None
    tensors: tuple[TensorChange, ...]
    files: tuple[FileFacts, ...]
    measured: Measured
    limits: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    advice: str = ""
    ended: str = ""

    def file(self, role: str) -> FileFacts | None:
        """The file that played a role, or None."""
        return next((facts for facts in self.files if facts.role == role), None)

    def check(self, check_id: str) -> Check:
        """The check called `suite/name`.

        Raises:
            KeyError: there is none.
        """
        for check in self.checks:
            if check.id == check_id:
                return check
        raise KeyError(check_id)


def overall(checks: Sequence[Check]) -> Verdict:
    """Fail beats inconclusive beats pass; no check at all is inconclusive, never a pass."""
    verdicts = {check.verdict for check in checks}
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    if Verdict.INCONCLUSIVE in verdicts or not verdicts:
        return Verdict.INCONCLUSIVE
    return Verdict.PASS


@cache
def _adapter() -> TypeAdapter[Verification]:
    return TypeAdapter(Verification)


def to_document(outcome: Verification) -> dict[str, Any]:
    """The outcome as JSON values."""
    document: dict[str, Any] = _adapter().dump_python(outcome, mode="json")
    return document


def to_json(outcome: Verification) -> str:
    """The outcome as one JSON document."""
    return json.dumps(to_document(outcome), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str | bytes) -> Verification:
    """Read what `to_json` wrote.

    Raises:
        VerificationError: it is not such a document; the message names the first field that is wrong.
    """
    try:
        return _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise VerificationError(
            f"this is not a verify result of schema version {SCHEMA_VERSION}: {where}: {first['msg']}"
        ) from error


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `to_json`'s documents."""
    schema = _adapter().json_schema(mode="serialization")
    title = f"qguard-edge verify result, version {SCHEMA_VERSION}"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}
