"""Make a baseline pack: run the base once, write everything down.

Greedy answers to every suite, and for every position of the drift texts the base's `top_k` likeliest next tokens. The
first texts are decoded twice, in chunks of another size: the noise floor.
"""

import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convert.cores import available_cores
from convert.gguf_file import GgufFile
from qguard_edge.packs.matchers import matchers_as_values
from qguard_edge.packs.pack import PACK_VERSION, Pack, PackPrompt, PackSuite, PackText, PackTurn, ServerProbe
from qguard_edge.packs.topk import FloatArray, IntArray, compare_rows
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.batching import Answer, Sampling
from qguard_edge.runtimes.fidelity import log_softmax
from qguard_edge.runtimes.llama import LlamaModel, safe_extra_buffers, system_info
from qguard_edge.verify.asking import AskSettings, Questions, SuiteQuestions, answers_of, prepare, replies_of
from qguard_edge.verify.drift import CHUNK, NOISE_CHUNK, NOISE_DOCUMENTS
from qguard_edge.verify.engines import all_versions
from qguard_edge.verify.files import TOKENIZER_KEYS, model_facts
from qguard_edge.verify.fitting import askable, check_base
from qguard_edge.verify.gguf_subject import GgufEngine, GgufSubject
from qguard_edge.verify.keep import WorkFolder
from qguard_edge.verify.results import Measured
from qguard_edge.verify.rounds import SuiteRun
from qguard_edge.verify.runner import LlamaFactory, Runner
from qguard_edge.verify.suites.base import Reply, Suite
from qguard_edge.verify.verifier import NO_TEMPLATE, built_in_texts

DEFAULT_TOP_K = 32
PROBES = 6
"""Positions of each text that a server has to predict."""
LEAST_PREFIX = 4
PACK_PROMPTS = 448
"""Of a suite that has more: a behaviour that nobody shows is decided at 208 prompts, an attack of success 0.2 at 110 to 230,
and honest graded scores with a standard deviation of 0.1 are decided here in 96% of the runs (see docs/verification.md)."""
DIGITS = 5


@dataclass(frozen=True)
class BaselineRequest:
    """What the user asked for.

    Attributes:
        base: the full-precision GGUF.
        suites: in order.
        texts: for drift; empty for the built-in ones.
        limit: prompts per suite, and texts, at most; None: `PACK_PROMPTS` where a suite has more, all texts.
        top_k: likeliest tokens to keep per position.
        threads: 0 for all cores.
        parallel: sequences decoded side by side.
        n_gpu_layers: layers on the GPU, -1 for all.
        allow_quantized_base: record a base that is quantized itself.
    """

    base: Path
    suites: tuple[Suite, ...] = ()
    texts: tuple[str, ...] = ()
    limit: int | None = None
    top_k: int = DEFAULT_TOP_K
    threads: int = 0
    parallel: int = 32
    n_gpu_layers: int = 0
    allow_quantized_base: bool = False


def ask_settings(threads: int, n_gpu_layers: int, parallel: int, seed: int = 0) -> AskSettings:
    """Settings for greedy answers in llama.cpp."""
    factory = LlamaFactory(threads or available_cores(), n_gpu_layers, safe_extra_buffers())
    return AskSettings(factory, parallel, 1, Sampling(0.0, seed), {})


def tokenizer_hash(file: GgufFile) -> str:
    """SHA-256 of the fields that decide what token ids mean, and of the begin token."""
    digest = hashlib.sha256()
    for key in (*TOKENIZER_KEYS, "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token"):
        raw = b"" if key not in file.fields else file.raw(file.fields[key].value_start, file.fields[key].end)
        digest.update(key.encode() + len(raw).to_bytes(8, "little") + bytes(raw))
    return digest.hexdigest()


def record(request: BaselineRequest, progress: Progress | None = None) -> Pack:
    """Run the base on all prompts and texts.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user.
    """
    progress = progress or NoProgress()
    base = GgufSubject(request.base)
    model = base.model
    warnings = check_base(base, allow_quantized=request.allow_quantized_base)
    suites, left_out = askable(request.suites, base)
    suites = tuple(_first_prompts(suite, request.limit) for suite in suites)
    questions = prepare(base, suites, (request.texts or built_in_texts())[: request.limit])
    if questions.template is None and suites:
        left_out.append(NO_TEMPLATE)
    how = ask_settings(request.threads, request.n_gpu_layers, request.parallel)
    started = time.perf_counter()
    facts = model_facts("base", model)
    answers: Mapping[str, tuple[Answer, ...]] = {}
    speed = None
    if suites:
        work = WorkFolder(None)
        answers, speed = answers_of(request.base, facts.sha256, "base", questions, how, work, progress)
    asked_seconds = time.perf_counter() - started
    rows, noise = _texts(request, questions, how, progress)
    bos = bool(model.first.get("tokenizer.ggml.add_bos_token", False))
    with LlamaModel(request.base, vocab_only=True) as vocabulary:
        replies = replies_of(answers, vocabulary)
        packed = tuple(_suite(a, answers[a.suite.name], replies[a.suite.name], vocabulary, bos) for a in questions.suites)
        texts = tuple(_text(ids, row, vocabulary, bos) for ids, row in zip(questions.documents, rows, strict=True))
        names = token_names(vocabulary)
        size = vocabulary.n_vocab
    settings = {**how.factory.describe(), "parallel": request.parallel, "limit": request.limit, "top_k": request.top_k}
    new_tokens = {f"new_tokens.{asked.suite.name}": asked.suite.new_tokens for asked in questions.suites}
    return Pack(
        pack_version=PACK_VERSION,
        base=facts,
        vocabulary=size,
        tokenizer=tokenizer_hash(model.first),
        top_k=min(request.top_k, size),
        suites=packed,
        texts=texts,
        pieces={str(token): names[token] for token in sorted(_mentioned(texts) & names.keys())},
        noise_floor=noise,
        measured=Measured(
            versions=all_versions(GgufEngine.packages),
            system=system_info().strip(),
            machine=f"{platform.system()} {platform.machine()}",
            settings={**settings, **new_tokens},
            suites={**{asked.suite.name: len(asked.ids) for asked in questions.suites}, "drift": len(questions.documents)},
            samples=1,
            temperature=0.0,
            seed=0,
            chat_template=hashlib.sha256(questions.template.source.encode()).hexdigest() if questions.template else None,
            seconds={
                "answers": round(asked_seconds, 3),
                "texts": round(time.perf_counter() - started - asked_seconds, 3),
            },
            tokens_per_second={"base": speed} if speed else {},
        ),
        warnings=(*warnings, *left_out),
    )


def _first_prompts(suite: Suite, limit: int | None) -> Suite:
    """A suite with the prompts that go into the pack, in the order of asking."""
    most = limit or (PACK_PROMPTS if suite.source is not None else len(suite.prompts))
    return replace(suite, prompts=SuiteRun(suite, 1, 0, most, ("base",)).upcoming(0, most), source=None)


@dataclass(frozen=True)
class _Rows:
    """One text's numbers, rounded as they are written."""

    ids: IntArray
    logprobs: FloatArray
    following: FloatArray


def _texts(
    request: BaselineRequest, questions: Questions, how: AskSettings, progress: Progress
) -> tuple[list[_Rows], float]:
    """The base's likeliest tokens on every text, and the noise floor."""
    progress.stage("Reading the texts", len(questions.documents), "texts")
    n_ctx = max(len(ids) for ids in questions.documents)
    found, noise = [], []
    factory = how.factory
    with (
        factory.open(request.base, n_ctx=n_ctx, n_batch=CHUNK) as model,
        factory.open(request.base, n_ctx=n_ctx, n_batch=NOISE_CHUNK) as again,
    ):
        for number, ids in enumerate(questions.documents):
            logs = text_logprobs(model, ids)
            rows = _top(logs, ids, min(request.top_k, logs.shape[1]))
            found.append(rows)
            if number < NOISE_DOCUMENTS:
                second = text_logprobs(again, ids)
                noise.append(compare_rows(rows.ids, rows.logprobs, rows.following, ids[1:], second).kl)
            progress.advance(1)
    return found, float(np.mean(np.concatenate(noise)))


def text_logprobs(model: Runner, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Log-probabilities of the token after every position of a text but the last: f32 `[n - 1, n_vocab]`."""
    return np.concatenate([log_softmax(chunk) for chunk in model.logits_chunks(ids[:-1])])


def _top(logs: npt.NDArray[np.float32], ids: Sequence[int], k: int) -> _Rows:
    chosen = np.argpartition(-logs, k - 1, axis=-1)[:, :k]
    values = np.take_along_axis(logs, chosen, -1)
    order = np.argsort(-values, axis=-1, kind="stable")
    following = logs[np.arange(len(logs)), list(ids[1:])]
    return _Rows(
        np.take_along_axis(chosen, order, -1).astype(np.int64),
        _rounded(np.take_along_axis(values, order, -1)),
        _rounded(following),
    )


def _rounded(values: npt.NDArray[np.float32]) -> FloatArray:
    rounded: FloatArray = values.astype(np.float64).round(DIGITS)
    return rounded


def _suite(
    asked: SuiteQuestions, answers: Sequence[Answer], replies: Sequence[Reply], vocabulary: LlamaModel, bos: bool
) -> PackSuite:
    suite = asked.suite
    judged = {matcher.name: matcher.judge(suite.prompts, replies) for matcher in suite.matchers}
    prompts = tuple(
        PackPrompt(
            id=prompt.id,
            text=prompt.text,
            completion=prompt.completion,
            system=prompt.system,
            turns=tuple(PackTurn(role, content) for role, content in prompt.turns),  # type: ignore[arg-type]
            tools=tuple(json.loads(tool) for tool in prompt.tools),
            expected=prompt.expected,
            tags=prompt.tags,
            tokens=asked.ids[i],
            sent=sendable(asked.ids[i], vocabulary, bos),
            answer_tokens=answers[i].tokens,
            answer=replies[i].text,
            ended=replies[i].ended,
            matches={name: found[i] for name, found in judged.items()},
        )
        for i, prompt in enumerate(suite.prompts)
    )
    matchers = matchers_as_values(suite.matchers)
    return PackSuite(suite.name, suite.title, suite.new_tokens, suite.discovery, matchers, prompts)


def _text(ids: Sequence[int], rows: _Rows, vocabulary: LlamaModel, bos: bool) -> PackText:
    places = np.unique(np.linspace(min(LEAST_PREFIX, len(ids) - 1), len(ids) - 1, PROBES).astype(int))
    probes = tuple(ServerProbe(int(n), sendable(ids[:n], vocabulary, bos)) for n in places)
    return PackText(
        tokens=tuple(ids),
        next_logprobs=tuple(rows.following.tolist()),
        top_ids=tuple(tuple(row) for row in rows.ids.tolist()),
        top_logprobs=tuple(tuple(row) for row in rows.logprobs.tolist()),
        probes=probes,
    )


def sendable(ids: Sequence[int], vocabulary: LlamaModel, bos: bool) -> str | None:
    """The text that gives these ids in a server that adds the begin token itself; None if there is none."""
    start = vocabulary.tokenize("", add_special=True) if bos else []
    if list(ids[: len(start)]) != start:
        return None
    wanted = list(ids[len(start) :])
    text = vocabulary.detokenize(wanted, special=True)
    # Tokenizers of the SentencePiece kind put a space in front themselves.
    return next((t for t in (text, text.removeprefix(" ")) if t and vocabulary.tokenize(t) == wanted), None)


def token_names(vocabulary: LlamaModel) -> dict[int, str]:
    """Text by token, for tokens whose text is whole and not that of another token.

    Servers that name tokens by their text leave out bytes that are no character on their own, so a token that ends in
    half a character has the name of the token without it.
    """
    texts = vocabulary.texts([[token] for token in range(vocabulary.n_vocab)])
    count = Counter(text.replace("\ufffd", "") for text in texts)
    return {token: text for token, text in enumerate(texts) if text and "\ufffd" not in text and count[text] == 1}


def _mentioned(texts: Sequence[PackText]) -> set[int]:
    return {token for text in texts for row in (*text.top_ids, text.tokens) for token in row}
