"""Check a candidate, a file or a running server, against a baseline pack; the outcome is that of `verify`.

    pack read -> drift -> rounds: answers to the pack's token ids, judged beside the recorded ones -> verdict

The same matchers, statistics and limits as in `qguard_edge.verify`; the differences are listed in the outcome's limits: the
base was run earlier, perhaps elsewhere, and the drift is a lower bound (`topk`). The recorded answers are judged
again with the matchers of today, so that both sides are judged alike; where that changes a recorded match, there is a
warning.
"""

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.gguf_file import GgufModel
from qguard_edge.packs.asked import Ask, Asked, ask_in_rounds
from qguard_edge.packs.pack import Pack, PackError, PackSuite, PackText
from qguard_edge.packs.record import ask_settings, text_logprobs, tokenizer_hash
from qguard_edge.packs.server import Dialect, connect
from qguard_edge.packs.topk import compare_listed, compare_rows
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.llama import LlamaModel, system_info
from qguard_edge.verify.advice import advice_on, summarise_checks
from qguard_edge.verify.asking import Asker, SuiteQuestions, contexts_of, replies_of
from qguard_edge.verify.checks import Margins, SuiteAnswers, with_drift, with_evidence
from qguard_edge.verify.drift import CHUNK, DocumentDrift, DriftRules, drift_and_check
from qguard_edge.verify.engines import all_versions
from qguard_edge.verify.files import model_facts
from qguard_edge.verify.gguf_subject import LLAMA_LIMITS, GgufEngine
from qguard_edge.verify.keep import WorkFolder
from qguard_edge.verify.results import (
    SCHEMA_VERSION,
    Check,
    FileFacts,
    Measured,
    Verdict,
    Verification,
    overall,
)
from qguard_edge.verify.suites.base import Reply
from qguard_edge.verify.verifier import limits_of

DEFAULT_MARGINS = Margins()
LISTED = 2
"""A server must list this many times `top_k` log-probabilities."""
PACK_LIMITS = (
    "The base was run when the baseline pack was made; another build of llama.cpp or another processor adds a little "
    "drift of its own.",
    "The drift is a lower bound: of the base's predictions the pack knows only the likeliest tokens one by one.",
)
SERVER_LIMITS = (
    "The model ran in a server: which file it is, and whether the server changes prompts or answers, was not seen.",
    "Drift was measured at a few positions of each text; for the perplexity ratio, next tokens less likely than what the server "
    "lists count as just listed, for both models.",
)


@dataclass(frozen=True)
class CheckRequest:
    """What the user asked for.

    Attributes:
        pack: the baseline.
        source: the pack's file, for the report; None: it was made in this process.
        candidate: the GGUF to check, or None for a server.
        server: address of a running server, or None for a file.
        margins: differences that are still called no worse.
        max_kl: highest mean KL that passes; None: by the candidate's type.
        limit: prompts per suite, and texts, at most; None: all.
        keep_going: ask on when a check has failed, until all are decided.
        threads: 0 for all cores.
        parallel: sequences decoded side by side.
        n_gpu_layers: layers on the GPU, -1 for all.
        work: folder for finished pieces, so that a killed run goes on; None keeps nothing.
    """

    pack: Pack
    source: FileFacts | None = None
    candidate: Path | None = None
    server: str | None = None
    margins: Margins = DEFAULT_MARGINS
    max_kl: float | None = None
    limit: int | None = None
    keep_going: bool = False
    threads: int = 0
    parallel: int = 32
    n_gpu_layers: int = 0
    work: Path | None = None


@dataclass
class _Measurements:
    """Answers and drift of the candidate, and how they were measured."""

    facts: FileFacts
    asked: Asked
    drift: list[DocumentDrift]
    settings: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    speed: float | None = None
    limits: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    system: str = ""


def check(request: CheckRequest, progress: Progress | None = None) -> Verification:
    """Run a check.

    Raises:
        PackError: pack and candidate do not belong together, or there is not exactly one candidate.
        QGuardError: another of its kinds, with a sentence for the user.
    """
    if (request.candidate is None) == (request.server is None):
        raise PackError("check needs a candidate, either a GGUF file or --server URL")
    progress = progress or NoProgress()
    found = _measure_file(request, progress) if request.candidate else _measure_server(request, progress)
    return _judge(request, found)


# Running --------------------------------------------------------------------------------------------------------------


def _measure_file(request: CheckRequest, progress: Progress) -> _Measurements:
    assert request.candidate is not None
    pack = request.pack
    model = GgufModel(request.candidate)
    if tokenizer_hash(model.first) != pack.tokenizer:
        raise PackError(
            f"{request.candidate.name} has another tokenizer than the pack's base {pack.base.name}; "
            "the pack's token ids would mean other texts"
        )
    progress.stage("Hashing the file", 0, "")
    facts = model_facts("candidate", model)
    warnings = []
    if facts.architecture != pack.base.architecture:
        warnings.append(f"the candidate is a {facts.architecture}, the pack's base a {pack.base.architecture}")
    suites = [SuiteQuestions(packed.suite(), tuple(prompt.tokens for prompt in packed.prompts)) for packed in pack.suites]
    texts = pack.texts[: request.limit]
    context = model.first.count(f"{model.architecture}.context_length", 1 << 20)
    longest = max([asked.n_ctx for asked in suites] + [len(text.tokens) for text in texts])
    if longest > context:
        raise PackError(
            f"the pack needs a context of {longest} tokens and {request.candidate.name} is made for {context}; record a pack "
            "whose prompts are shorter"
        )
    how = ask_settings(request.threads, request.n_gpu_layers, request.parallel)
    started = time.perf_counter()
    progress.stage("Measuring the drift", len(texts), "texts")
    drift = []
    with how.factory.open(request.candidate, n_ctx=max(len(text.tokens) for text in texts), n_batch=CHUNK) as runner:
        for text in texts:
            drift.append(_compare_text(text, text_logprobs(runner, text.tokens)))
            progress.advance(1)
    drift_seconds = time.perf_counter() - started
    asker = Asker(request.candidate, facts.sha256, "candidate", how, WorkFolder(request.work))
    with closing(asker), LlamaModel(request.candidate, vocab_only=True) as vocabulary:

        def ask(packed: PackSuite, places: Sequence[int]) -> list[Reply | None]:
            suite, ids = packed.suite(), tuple(packed.prompts[i].tokens for i in places)
            told = partial(progress.advance, detail=suite.name)
            given = asker.ask(SuiteQuestions(suite, ids), 0, len(ids), contexts_of(suites), told)
            return list(replies_of({suite.name: given}, vocabulary)[suite.name])

        asked = _rounds(request, facts, drift, ask, progress)
    seconds = {"answers": round(time.perf_counter() - started - drift_seconds, 3), "drift": round(drift_seconds, 3)}
    settings = {**how.factory.describe(), "parallel": request.parallel}
    return _Measurements(
        facts, asked, drift, settings=settings, seconds=seconds, speed=asker.speed, limits=PACK_LIMITS, warnings=warnings,
        system=system_info().strip(),
    )  # fmt: skip


def _rounds(request: CheckRequest, facts: FileFacts, drift: Sequence[DocumentDrift], ask: Ask, progress: Progress) -> Asked:
    failed = drift_and_check({"candidate": drift}, 0.0, _rules(request, facts))[1].verdict is Verdict.FAIL
    if failed and not request.keep_going:
        return Asked(ended="the model fails drift, so nothing was asked (--keep-going asks all the same)")
    return ask_in_rounds(request.pack, request.limit, request.margins, request.keep_going, ask, progress)


def _compare_text(text: PackText, log_q: npt.NDArray[np.float32]) -> DocumentDrift:
    top_ids, p_top = np.array(text.top_ids, np.int64), np.array(text.top_logprobs, np.float64)
    return compare_rows(top_ids, p_top, np.array(text.next_logprobs, np.float64), text.tokens[1:], log_q)


def _measure_server(request: CheckRequest, progress: Progress) -> _Measurements:
    assert request.server is not None
    pack = request.pack
    connection, dialect = connect(request.server, pack.pieces, pack.texts[0].tokens[:2])
    _check_vocabulary(pack, dialect)
    started = time.perf_counter()
    texts = pack.texts[: request.limit]
    progress.stage("Measuring the drift", len(texts), "texts")
    drift = []
    for text in texts:
        if (measured := _probe_text(text, pack.top_k, dialect)) is not None:
            drift.append(measured)
        progress.advance(1)
    drift_seconds = time.perf_counter() - started
    probes, measured_probes = sum(len(text.probes) for text in texts), sum(len(part.kl) for part in drift)
    if 2 * measured_probes < probes:
        raise PackError(
            f"this server lists log-probabilities for {measured_probes} of the pack's {probes} probes; half of them are needed "
            "(llama.cpp's own server lists them for nearly all)"
        )
    facts = FileFacts("candidate", connection.name, "", 0)

    def ask(packed: PackSuite, places: Sequence[int]) -> list[Reply | None]:
        # One request at a time: a server that computes several at once may round differently (llama.cpp#24962).
        answers: list[Reply | None] = []
        for prompt in (packed.prompts[i] for i in places):
            given = dialect.complete(prompt.tokens, prompt.sent, packed.new_tokens)
            answers.append(None if given is None else Reply(given.text, given.ended))
            progress.advance(1)
        return answers

    asked = _rounds(request, facts, drift, ask, progress)
    seconds = {"answers": round(time.perf_counter() - started - drift_seconds, 3), "drift": round(drift_seconds, 3)}
    settings: dict[str, str | int | float | bool | None] = {"endpoint": dialect.name, "probes": probes}
    warnings = [
        f"{left} prompts of {name} cannot be sent as text to this server and were left out"
        for name, left in asked.skipped.items()
        if left
    ]
    return _Measurements(
        facts, asked, drift, settings, seconds, None, (*PACK_LIMITS, *SERVER_LIMITS), warnings,
        "not known: the model ran in a server",
    )  # fmt: skip


def _check_vocabulary(pack: Pack, dialect: Dialect) -> None:
    """Send one short probe, so that a wrong server is refused at once and with a reason."""
    for text in pack.texts:
        for probe in text.probes:
            if probe.sent is not None:
                dialect.complete(text.tokens[: probe.tokens], probe.sent, 1, 1)
                return


def _probe_text(text: PackText, top_k: int, dialect: Dialect) -> DocumentDrift | None:
    """A text's probes, compared; None when none of them can be sent or the server lists nothing."""
    rows = []
    for probe in text.probes:
        answer = dialect.complete(text.tokens[: probe.tokens], probe.sent, 1, LISTED * top_k)
        if answer is not None and answer.listed:
            row = probe.tokens - 1
            following = text.tokens[probe.tokens]
            ids, logprobs, expected = text.top_ids[row], text.top_logprobs[row], text.next_logprobs[row]
            rows.append(compare_listed(ids, logprobs, expected, following, answer.listed, dialect.can_name))
    if not rows:
        return None
    kl, same, loss = zip(*rows, strict=True)
    return DocumentDrift(np.array(kl, np.float64), np.array(same, np.bool_), np.array(loss, np.float64))


# Judging --------------------------------------------------------------------------------------------------------------


def _judge(request: CheckRequest, found: _Measurements) -> Verification:
    pack = request.pack
    checks: list[Check] = []
    warnings = [f"when the pack was made: {warning}" for warning in pack.warnings] + found.warnings
    for packed, run in zip(pack.suites, found.asked.runs, strict=False):
        if not run.prompts:
            raise PackError(f"none of the prompts of {packed.name} can be sent to this server; use one with /completion")
        answers = run.answers()
        checks += with_evidence(answers, run.found)
        matches = {prompt.id: prompt.matches for prompt in packed.prompts}
        warnings += _changed_matches(packed.name, answers, [matches[prompt.id] for prompt in run.prompts])
    rules = _rules(request, found.facts)
    drift, drift_check = drift_and_check({"candidate": found.drift}, pack.noise_floor, rules)
    checks = with_drift(checks, drift_check)
    then, now = pack.measured.versions, all_versions(GgufEngine.packages)
    if request.candidate and then.get("llama-cpp-python") != now["llama-cpp-python"]:
        warnings.append(
            f"the pack was recorded with llama-cpp-python {then.get('llama-cpp-python')}, this is {now['llama-cpp-python']}"
        )
    return Verification(
        schema_version=SCHEMA_VERSION,
        verdict=overall(checks),
        summary=summarise_checks(checks),
        checks=tuple(checks),
        drift=drift,
        tensors=(),
        files=(found.facts, pack.base, *([request.source] if request.source else [])),
        measured=_measured(request, found, now),
        limits=(*limits_of([suite.name for suite in pack.suites]), *LLAMA_LIMITS, *found.limits),
        warnings=tuple(warnings),
        advice=advice_on(checks, pack=True),
        ended=found.asked.ended,
    )


def _rules(request: CheckRequest, facts: FileFacts) -> DriftRules:
    return DriftRules(facts.file_type, request.max_kl, lower_bound=True)


def _changed_matches(name: str, answers: SuiteAnswers, recorded: Sequence[Mapping[str, bool | None]]) -> list[str]:
    """A warning where the recorded answers are judged differently today."""
    changed = sum(
        then.get(matcher) != now
        for matcher, judged in answers.judged.items()
        for then, now in zip(recorded, judged["base"], strict=True)
    )
    if not changed:
        return []
    return [f"{changed} recorded match results of {name} come out differently today; both sides were judged anew"]


def _measured(request: CheckRequest, found: _Measurements, now: Mapping[str, str]) -> Measured:
    pack = request.pack
    return Measured(
        versions={**now, **{f"pack: {name}": text for name, text in pack.measured.versions.items()}},
        system=found.system,
        machine=f"{platform.system()} {platform.machine()}",
        settings={
            **found.settings,
            "limit": request.limit,
            "top_k": pack.top_k,
            **request.margins.describe(),
        },
        suites={**{run.suite.name: len(run.prompts) for run in found.asked.runs}, "drift": len(found.drift)},
        samples=1,
        temperature=0.0,
        seed=0,
        chat_template=pack.measured.chat_template,
        seconds=found.seconds,
        tokens_per_second={"candidate": found.speed} if found.speed else {},
    )
