"""Run the models: token ids once, answers and drift per file, finished pieces kept.

The token ids are prepared from the *base* alone: its chat template, its tokenizer, its length limits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qguard_edge.progress import Progress
from qguard_edge.runtimes.batching import SCHEDULE, Answer, Sampling
from qguard_edge.verify.chat import ChatTemplate, render
from qguard_edge.verify.drift import CHUNK, NOISE_CHUNK, NOISE_DOCUMENTS, DocumentDrift, measure_documents
from qguard_edge.verify.keep import WorkFolder, key_of
from qguard_edge.verify.runner import USUAL_CONTEXT, Runner, RunnerFactory, sequences
from qguard_edge.verify.subjects import Subject, TextTokenizer
from qguard_edge.verify.suites.base import Reply, Suite, SuiteError, SuitePrompt

PIECE = 96
"""Prompts that are answered and kept together."""
LONGEST_DOCUMENT = 512
ROUND_TO = 64
BATCH = 512
"""Tokens per call when answers are generated; larger ones cost memory for logits and bring no speed."""


Contexts = Mapping[int, int]
"""Tokens that a sequence must hold, per group of prompts."""


@dataclass(frozen=True)
class SuiteQuestions:
    """A suite as token ids.

    Attributes:
        suite: prompts and matchers; prompts cut to the limit.
        ids: token ids per prompt.
    """

    suite: Suite
    ids: tuple[tuple[int, ...], ...]

    @property
    def n_ctx(self) -> int:
        """Tokens that one sequence must hold."""
        return max((len(ids) for ids in self.ids), default=0) + self.suite.new_tokens


@dataclass(frozen=True)
class Questions:
    """The input of every file.

    Attributes:
        suites: in order.
        documents: token ids of the texts for drift.
        template: the chat template that was used; None: the model has none, prompts are used as they are.
    """

    suites: tuple[SuiteQuestions, ...]
    documents: tuple[tuple[int, ...], ...]
    template: ChatTemplate | None


def prepare(base: Subject, suites: Sequence[Suite], texts: Sequence[str]) -> Questions:
    """Render and tokenize with the base's template and vocabulary.

    Raises:
        SuiteError: a prompt is longer than the model's context, or no text has two tokens.
    """
    template, limit = base.template(), base.context_length
    asked = questions_of(base, suites, template)
    with base.vocabulary() as vocabulary:
        longest = min(LONGEST_DOCUMENT, limit)
        tokenized = (tuple(vocabulary.tokenize(text, add_special=True, parse_special=False)[:longest]) for text in texts)
        documents = tuple(ids for ids in tokenized if len(ids) >= 2)
    if not documents:
        raise SuiteError("no text has two tokens or more; there is nothing to measure drift on")
    return Questions(asked, documents, template)


def questions_of(base: Subject, suites: Sequence[Suite], template: ChatTemplate | None) -> tuple[SuiteQuestions, ...]:
    """The prompts of suites as token ids.

    Raises:
        SuiteError: a prompt is longer than the model's context.
    """
    with base.vocabulary() as vocabulary:
        return tuple(_ask(suite, vocabulary, template, base.context_length) for suite in suites)


def _ask(suite: Suite, vocabulary: TextTokenizer, template: ChatTemplate | None, limit: int) -> SuiteQuestions:
    chats = [prompt for prompt in suite.prompts if not prompt.completion]
    rendered = dict(zip((p.id for p in chats), render(template, chats), strict=True)) if template and chats else {}

    start = vocabulary.tokenize("", add_special=True)[:1]  # the begin token, where the model has one

    def ids_of(prompt: SuitePrompt) -> tuple[int, ...]:
        if prompt.id in rendered:
            ids = vocabulary.tokenize(rendered[prompt.id])
            return tuple(ids if ids[:1] == start else start + ids)  # the template may have written the begin token itself
        return tuple(vocabulary.tokenize(prompt.text, add_special=True, parse_special=False))

    ids = tuple(ids_of(prompt) for prompt in suite.prompts)
    for prompt, tokens in zip(suite.prompts, ids, strict=True):
        if not tokens:
            raise SuiteError(f"suite {suite.name}, prompt {prompt.id}: it has no token in this model's vocabulary")
        if len(tokens) + suite.new_tokens > limit:
            raise SuiteError(
                f"suite {suite.name}, prompt {prompt.id}: {len(tokens)} tokens and {suite.new_tokens} new ones; "
                f"the model's context is {limit}"
            )
    return SuiteQuestions(suite, ids)


@dataclass(frozen=True)
class AskSettings:
    """How the models are run.

    Attributes:
        factory: loads them.
        parallel: sequences side by side.
        samples: answers per prompt.
        sampling: temperature and seed.
        versions: part of the key of kept pieces.
        at_once: files that answer at the same time.
    """

    factory: RunnerFactory
    parallel: int
    samples: int
    sampling: Sampling
    versions: Mapping[str, str]
    at_once: int = 1

    def key(self, **more: Any) -> str:
        """Key of a piece made with these settings."""
        sampling = {"samples": self.samples, **asdict(self.sampling)}
        return key_of(
            {**self.factory.describe(), **self.versions, "parallel": self.parallel, "schedule": SCHEDULE, **sampling, **more}
        )


class Asker:
    """One file that is asked again and again. It is loaded when an answer is needed that was not kept.

    Args:
        path: of the file.
        sha256: what decides its answers, see `Engine.identity`.
        role: of the file.
        how: it is run.
        work: where answers are kept.
    """

    def __init__(self, path: Path, sha256: str, role: str, how: AskSettings, work: WorkFolder) -> None:
        self.path, self.sha256, self.role, self.how, self.work = path, sha256, role, how, work
        self.tokens, self.seconds = 0, 0.0
        self._stack = ExitStack()
        self._model: Runner | None = None
        self._n_ctx = 0

    def ask(
        self, asked: SuiteQuestions, start: int, stop: int, contexts: Contexts, told: Callable[[int], None] = lambda _: None
    ) -> tuple[Answer, ...]:
        """Answers to prompts `start` to `stop` of a suite; `samples` for each prompt.

        Prompts of similar length are answered together, the short ones first, each group in a context of its own size.

        Args:
            asked: the suite.
            start: first prompt.
            stop: behind the last one.
            contexts: see `contexts_of`.
            told: called with the number of answers of each piece.
        """
        samples, new = self.how.samples, asked.suite.new_tokens
        groups = [group_of(len(ids) + new) for ids in asked.ids[:stop]]
        answers: dict[int, Answer] = {}
        for group in sorted(set(groups[start:])):
            n_ctx, before = contexts[group], groups[:start].count(group)
            places = [i * samples + s for i in range(start, stop) if groups[i] == group for s in range(samples)]
            for at in range(0, len(places), PIECE):
                part = places[at : at + PIECE]
                prompts, first = [asked.ids[place // samples] for place in part], before * samples + at
                key = self.how.key(model=self.sha256, prompts=prompts, new=new, start=first, n_ctx=n_ctx)
                make = partial(self._make, prompts, new, first, n_ctx)
                answers |= zip(part, self.work.answers(key, make, count=len(part), longest=new), strict=True)
                told(len(part))
        return tuple(answers[place] for place in range(start * samples, stop * samples))

    def _make(self, part: Sequence[Sequence[int]], new: int, first: int, n_ctx: int) -> list[Answer]:
        model = self._open(n_ctx)
        began = time.perf_counter()
        made = model.generate(part, new, sampling=self.how.sampling, first_index=first)
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(answer.tokens) for answer in made)
        return made

    def _open(self, n_ctx: int) -> Runner:
        n_seq = sequences(n_ctx, self.how.parallel)
        if self._model is None or (n_ctx != self._n_ctx and not self._model.resize(n_ctx=n_ctx, n_seq=n_seq)):
            self.close()
            how = self.how
            opened = how.factory.open(self.path, n_ctx=n_ctx, n_seq=how.parallel, n_batch=BATCH, role=self.role)
            self._model = self._stack.enter_context(opened)
        self._n_ctx = n_ctx
        return self._model

    def close(self) -> None:
        """Free the file; the next question loads it again."""
        self._model = None
        self._stack.close()

    @property
    def speed(self) -> float | None:
        """Generated tokens per second; None when every answer was kept from an earlier run."""
        return round(self.tokens / self.seconds, 1) if self.seconds else None


def group_of(tokens: int) -> int:
    """The group of sequences of similar length that one of so many tokens belongs to: the power of two above it, 512 at least."""
    return max(USUAL_CONTEXT, 1 << (tokens - 1).bit_length())


def contexts_of(suites: Sequence[SuiteQuestions]) -> Contexts:
    """Tokens that a sequence must hold in each group of prompts."""
    longest: dict[int, int] = {}
    for asked in suites:
        for ids in asked.ids:
            tokens = len(ids) + asked.suite.new_tokens
            group = group_of(tokens)
            longest[group] = max(longest.get(group, 0), tokens)
    return {group: -(-tokens // ROUND_TO) * ROUND_TO for group, tokens in longest.items()}


def answers_of(
    path: Path, sha256: str, role: str, questions: Questions, how: AskSettings, work: WorkFolder, progress: Progress
) -> tuple[dict[str, tuple[Answer, ...]], float | None]:
    """One file's answers to every suite; answer `i * samples + s` is the s-th sample on prompt i.

    Returns:
        Answers per suite, and generated tokens per second; None when every answer was kept from an earlier run.
    """
    suites = questions.suites
    progress.stage(f"Answers of the {role}", sum(len(asked.ids) for asked in suites) * how.samples, "answers")
    contexts = contexts_of(suites)
    found: dict[str, tuple[Answer, ...]] = {}
    asker = Asker(path, sha256, role, how, work)
    with closing(asker):
        for asked in suites:
            told = partial(progress.advance, detail=asked.suite.name)
            found[asked.suite.name] = asker.ask(asked, 0, len(asked.ids), contexts, told)
    return found, asker.speed


def replies_of(answers: Mapping[str, tuple[Answer, ...]], vocabulary: TextTokenizer) -> dict[str, tuple[Reply, ...]]:
    """Answers as text."""
    return {
        suite: tuple(Reply(vocabulary.detokenize(answer.tokens), answer.ended) for answer in given)
        for suite, given in answers.items()
    }


def drift_of(
    base: Path,
    others: Mapping[str, Path],
    hashes: Mapping[str, str],
    questions: Questions,
    how: AskSettings,
    work: WorkFolder,
    progress: Progress,
) -> dict[str, list[DocumentDrift]]:
    """Per role (and `noise`) the measurement of every text; texts whose measurements are kept are not measured again."""
    progress.stage("Measuring the drift", len(questions.documents), "texts")
    settings = {"chunk": CHUNK, "noise_chunk": NOISE_CHUNK, "base": hashes["base"]}

    def key(role: str, ids: Sequence[int]) -> str:
        return how.key(model=hashes["base" if role == "noise" else role], role=role == "noise", text=ids, **settings)

    def roles(number: int) -> list[str]:
        return [*others, *(["noise"] if number < NOISE_DOCUMENTS else [])]

    kept: list[Mapping[str, DocumentDrift | None]]
    kept = [{role: work.drift(key(role, ids), len(ids)) for role in roles(i)} for i, ids in enumerate(questions.documents)]
    missing = [i for i, found in enumerate(kept) if any(part is None for part in found.values())]
    progress.advance(len(kept) - len(missing))
    if missing:
        texts = [questions.documents[i] for i in missing]
        n_noise = sum(i < NOISE_DOCUMENTS for i in missing)
        measured = measure_documents(base, others, texts, how.factory, n_noise=n_noise, at_once=how.at_once)
        for i, document in zip(missing, measured, strict=True):
            for role, part in document.items():
                work.put_drift(key(role, questions.documents[i]), part)
            kept[i] = document
            progress.advance(1)
    return {role: [kept_part for found in kept if (kept_part := found.get(role)) is not None] for role in [*others, "noise"]}
