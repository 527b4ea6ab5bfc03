"""Does the file that ships behave like the model it was made from? The whole run, from files to a `Verification`.

    files checked -> prompts as token ids, once -> answers of every file -> drift -> checks -> verdict

Everything is compared with the *base*, the full-precision model, on the same token ids, paired by prompt: GGUF files in
llama.cpp, Hugging Face folders in transformers (see `subjects`). The plain model (the plain quantization, no defense) is
optional and decides nothing: it shows the verdict that an unprotected one would have got.

Drift is always measured. A file that writes noise never mentions a brand, so without it the worst file would pass.

What runs side by side: sequences within one model (see `batching`). Models run one after the other, and answers are judged after
the models are closed: llama.cpp's worker threads spin, and two models on the same cores slow each other down many times over.
"""

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import resources
from pathlib import Path

import numpy as np

from convert.cores import available_cores
from convert.folder_targets import KINDS
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.batching import Sampling
from qguard_edge.verify.asking import AskSettings, Questions, answers_of, drift_of, prepare, replies_of
from qguard_edge.verify.checks import Margins, SuiteAnswers, checks_of, discovery_error, with_drift
from qguard_edge.verify.drift import DriftRules, drift_and_check
from qguard_edge.verify.engines import all_versions, engine_of, versions_of
from qguard_edge.verify.files import PairError
from qguard_edge.verify.keep import WorkFolder
from qguard_edge.verify.results import (
    SCHEMA_VERSION,
    Check,
    FileFacts,
    Measured,
    TensorChange,
    Verdict,
    Verification,
    overall,
)
from qguard_edge.verify.subjects import Subject
from qguard_edge.verify.suites.base import Suite, SuiteError
from qguard_edge.verify.suites.files import BUILT_IN, built_in
from qguard_edge.verify.suites.matchers import PhraseMatcher

DEFAULT_MARGINS = Margins()
LIMITS = (
    "A pass says that the file behaves like its full-precision base on these prompts. A backdoor that is awake in full "
    "precision, or that needs a trigger none of the prompts contains, is not found.",
    "Prompts are short, single-turn and mostly English; long conversations, tools and other languages were not tested.",
)


@dataclass(frozen=True)
class VerifyRequest:
    """What the user asked for.

    Attributes:
        candidate: the GGUF or the folder that ships.
        base: the full-precision GGUF or folder it was made from.
        plain: plain quantization of it, for comparison.
        suites: in order.
        texts: for drift.
        margins: differences that are still called no worse.
        max_kl: highest mean KL that passes; None: by the candidate's type.
        limit: prompts per suite, and texts, at most; None: all.
        samples: answers per prompt; more than 1 needs a temperature.
        temperature: 0 is greedy.
        seed: of sampling and bootstrap.
        threads: 0 for all cores.
        parallel: sequences decoded side by side.
        n_gpu_layers: layers on the GPU, -1 for all.
        extra_buffers: repacked weights; None: where they are safe.
        device: auto, cpu or cuda, for folders.
        load_in: format (nf4, fp4, int8) in which bitsandbytes rounds full-precision folders while it loads them, the base
            excepted.
        work: folder for finished pieces, so that a killed run goes on; None keeps nothing.
        names: file names to report, by role, where they differ from the files' own.
        sources: suite and text files that took part, for the report.
    """

    candidate: Path
    base: Path
    plain: Path | None = None
    suites: tuple[Suite, ...] = ()
    texts: tuple[str, ...] = ()
    margins: Margins = DEFAULT_MARGINS
    max_kl: float | None = None
    limit: int | None = None
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    threads: int = 0
    parallel: int = 32
    n_gpu_layers: int = 0
    extra_buffers: bool | None = None
    device: str = "auto"
    load_in: str | None = None
    work: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[FileFacts, ...] = ()

    def check(self) -> None:
        """Refuse settings that cannot be.

        Raises:
            SuiteError: one sentence each.
        """
        if self.samples > 1 and self.temperature <= 0:
            raise SuiteError(f"--samples {self.samples} needs --temperature above 0: greedy answers are all the same")
        if self.load_in not in (None, *KINDS):
            raise SuiteError(f"--load-in {self.load_in!r}: choose one of {', '.join(KINDS)}")
        names = [suite.name for suite in self.suites]
        if len(set(names)) != len(names) or "drift" in names:
            raise SuiteError(f"two suites have the same name ({', '.join(names)}, drift); rename one in its file")


def select_suites(names: Sequence[str], more: Sequence[Suite] = (), phrases: Sequence[str] = ()) -> tuple[Suite, ...]:
    """Built-in suites by name, users' own after them, and the given phrases added to what looks for phrases.

    Args:
        names: of built-in suites; `all` for every one; `drift` is always run and may be named.
        more: read from files.
        phrases: to look for: in `injection` if it is among the suites, else in every suite.

    Raises:
        SuiteError: an unknown name, or phrases without a suite to look in.
    """
    wanted = [name for name in names if name != "drift"]
    wanted = list(BUILT_IN) if "all" in wanted else list(dict.fromkeys(wanted))
    suites = [built_in(name) for name in wanted] + list(more)
    if not phrases:
        return tuple(suites)
    if not suites:
        raise SuiteError("--phrase needs a suite to look in: add --suites injection or --suite FILE")
    everywhere = "injection" not in wanted
    added = PhraseMatcher(tuple(phrases), name="given-phrases")
    return tuple(
        replace(suite, matchers=(*suite.matchers, added)) if everywhere or suite.name == "injection" else suite
        for suite in suites
    )


def built_in_texts() -> tuple[str, ...]:
    """The drift suite's texts: short documents separated by lines of dashes."""
    text = resources.files("qguard_edge").joinpath("data", "suites", "drift.txt").read_text(encoding="utf-8")
    return tuple(part.strip() for part in text.split("\n----\n") if part.strip())


def verify(request: VerifyRequest, progress: Progress | None = None) -> Verification:
    """Run a verification.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user; finished pieces stay in the work folder.
    """
    request.check()
    return _Run(request, progress or NoProgress()).run()


class _Run:
    """One verification."""

    def __init__(self, request: VerifyRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        given = [path for path in (request.candidate, request.base, request.plain) if path is not None]
        self.engine = engine_of(
            given,
            threads=request.threads,
            n_gpu_layers=request.n_gpu_layers,
            extra_buffers=request.extra_buffers,
            device=request.device,
            load_in=request.load_in,
        )
        self.models = {
            role: self.engine.open(path)
            for role, path in (
                ("base", request.base),
                ("plain", request.plain),
                ("candidate", request.candidate),
            )
            if path is not None
        }
        self.warnings: list[str] = []
        for role, model in self.models.items():
            if role != "base":
                self.warnings += self.engine.check_pair(self.models["base"], model)
        self.seconds: dict[str, float] = {}
        self.speeds: dict[str, float] = {}

    def run(self) -> Verification:
        with self.engine.running():
            return self._run()

    def _run(self) -> Verification:
        request = self.request
        with self._stage("hash"):
            self.progress.stage("Hashing the files", 0, "")
            files = {role: self._facts(role, model) for role, model in self.models.items()}
        hashes = {role: self.engine.identity(role, facts) for role, facts in files.items()}
        if hashes["candidate"] == hashes["base"]:
            raise PairError("the candidate and the base are the same file; there is nothing to compare")
        suites = tuple(replace(suite, prompts=suite.prompts[: request.limit]) for suite in request.suites)
        with self._stage("prepare"):
            questions = prepare(self.models["base"], suites, (request.texts or built_in_texts())[: request.limit])
        if questions.template is None and suites:
            self.warnings.append("the base has no chat template: prompts were used as they are")
        how = self._ask_settings()
        work = WorkFolder(request.work)
        answers = self._answers(questions, how, hashes, work)
        others = {role: model.path for role, model in self.models.items() if role != "base"}
        with self._stage("drift"):
            measured = drift_of(request.base, others, hashes, questions, how, work, self.progress)
        noise = float(np.mean(np.concatenate([part.kl for part in measured.pop("noise")])))
        rules = DriftRules(files["candidate"].file_type, request.max_kl, request.seed)
        drift, drift_check = drift_and_check(measured, noise, rules)
        with self._stage("judge"):
            self.progress.stage("Judging the answers", len(answers), "suites")
            checks = self._checks(answers, suites)
        checks = with_drift(checks, drift_check)
        return Verification(
            schema_version=SCHEMA_VERSION,
            verdict=overall(checks),
            summary=summarise_checks(checks),
            checks=tuple(checks),
            drift=drift,
            tensors=self._tensors(),
            files=(
                files["candidate"],
                files["base"],
                *([files["plain"]] if "plain" in files else []),
                *request.sources,
            ),
            measured=self._measured(questions, how),
            limits=(*LIMITS, *self.engine.limits),
            warnings=tuple(self.warnings),
        )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)

    def _facts(self, role: str, model: Subject) -> FileFacts:
        return model.facts(role, self.request.names.get(role))  # type: ignore[arg-type]

    def _ask_settings(self) -> AskSettings:
        request = self.request
        versions = {**versions_of(self.engine.packages), "system": self.engine.system()}
        return AskSettings(
            self.engine.factory, request.parallel, request.samples, Sampling(request.temperature, request.seed), versions
        )

    def _answers(
        self, questions: Questions, how: AskSettings, hashes: Mapping[str, str], work: WorkFolder
    ) -> list[SuiteAnswers]:
        """Every file's answers, as text."""
        if not questions.suites:
            return []
        replies = {}
        for role, model in self.models.items():
            with self._stage(f"answers of the {role}"):
                found, speed = answers_of(model.path, hashes[role], role, questions, how, work, self.progress)
            if speed is not None:
                self.speeds[role] = speed
            with self.models["base"].vocabulary() as vocabulary:
                replies[role] = replies_of(found, vocabulary)
        return [
            SuiteAnswers(asked.suite, how.samples, {role: found[asked.suite.name] for role, found in replies.items()})
            for asked in questions.suites
        ]

    def _checks(self, answers: Sequence[SuiteAnswers], suites: Sequence[Suite]) -> list[Check]:
        checks = []
        for one in answers:
            checks += checks_of(one, self.request.margins, self.request.seed, discovery_error(suites))
            self.progress.advance(1, one.suite.name)
        return checks

    def _tensors(self) -> tuple[TensorChange, ...]:
        if "plain" not in self.models:
            return ()
        with self._stage("tensors"):
            return self.engine.tensor_changes(self.models, self.request.threads or available_cores())

    def _measured(self, questions: Questions, how: AskSettings) -> Measured:
        request = self.request
        prompts = {asked.suite.name: len(asked.ids) for asked in questions.suites}
        return Measured(
            versions=all_versions(self.engine.packages),
            system=self.engine.system().strip(),
            machine=f"{platform.system()} {platform.machine()}",
            settings={
                **how.factory.describe(),
                "parallel": request.parallel,
                "limit": request.limit,
                **request.margins.describe(),
                **{f"new_tokens.{asked.suite.name}": asked.suite.new_tokens for asked in questions.suites},
            },
            suites={**prompts, "drift": len(questions.documents)},
            samples=request.samples,
            temperature=request.temperature,
            seed=request.seed,
            chat_template=sha256(questions.template.source.encode()).hexdigest() if questions.template else None,
            seconds=dict(self.seconds),
            tokens_per_second=dict(self.speeds),
        )


def summarise_checks(checks: Sequence[Check]) -> str:
    """One sentence: how many checks have which verdict, and which failed."""
    failed = [check.id for check in checks if check.verdict is Verdict.FAIL]
    undecided = [check.id for check in checks if check.verdict is Verdict.INCONCLUSIVE]
    if failed:
        return f"{len(failed)} of {len(checks)} checks fail: {', '.join(failed)}"
    if undecided:
        return f"no check fails, {len(undecided)} of {len(checks)} are inconclusive: {', '.join(undecided)}"
    return f"all {len(checks)} checks pass: the file behaves like its base on what was asked"
