"""Does the file that ships behave like the model it was made from? The whole run, from files to a `Verification`.

    files checked -> drift -> rounds: prompts as token ids, answers of every file, a look at the checks -> verdict

Everything is compared with the *base*, the full-precision model, on the same token ids, paired by prompt: GGUF files in
llama.cpp, Hugging Face folders in transformers (see `subjects`). The plain model (the plain quantization, no defense) is
optional and decides nothing: it shows the verdict that an unprotected one would have got.

Drift is always measured, and first: a file that writes noise never mentions a brand, so without it the worst file would pass, and
if it fails nothing needs to be asked. The rounds (see `rounds`, `loop`) end when every check is decided.

What runs side by side: sequences within one model (see `batching`), and GGUF files, each on its share of the cores (see `loop`).
"""

import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import resources
from pathlib import Path

import numpy as np

from convert.cores import available_cores
from convert.folder_targets import KINDS
from convert.hashes import sha256_of
from convert.scratch import scratch_folder, shared_path
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.batching import Sampling
from qguard_edge.verify.advice import advice_on, summarise_checks
from qguard_edge.verify.asking import AskSettings, Questions, drift_of, prepare
from qguard_edge.verify.checks import Errors, Margins, with_drift, with_evidence
from qguard_edge.verify.drift import DriftRules, drift_and_check
from qguard_edge.verify.engines import all_versions, engine_of, versions_of
from qguard_edge.verify.files import PairError
from qguard_edge.verify.fitting import askable, check_base
from qguard_edge.verify.keep import WorkFolder
from qguard_edge.verify.loop import Budget, Files, Loop
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
from qguard_edge.verify.rounds import MOST_PROMPTS, SuiteRun
from qguard_edge.verify.runner import parallel_for
from qguard_edge.verify.subjects import Subject
from qguard_edge.verify.suites.base import Suite, SuiteError
from qguard_edge.verify.suites.files import BUILT_IN, OPTIONAL, built_in
from qguard_edge.verify.suites.matchers import PhraseMatcher

DEFAULT_MARGINS = Margins()
LIMITS = (
    "A pass says that the file behaves like its full-precision base on these prompts. A backdoor that is awake in full "
    "precision, or that needs a trigger none of the prompts contains, is not found.",
    "Prompts are short, single-turn and mostly English; long conversations, tools and other languages were not tested.",
)
NO_TEMPLATE = "the base has no chat template: prompts were used as they are"
WIDER = ("languages", "long", "tools")
"""Suites that ask what the second of `LIMITS` says was not tested."""


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
        limit: prompts per suite, and texts, at most; None: as many as the suite has up to `MOST_PROMPTS`, all texts.
        max_seconds: no round is begun that would end later; None: no limit.
        keep_going: ask on when a check has failed, until all are decided.
        allow_quantized_base: compare with a base that is quantized itself.
        samples: answers per prompt; more than 1 needs a temperature.
        temperature: 0 is greedy.
        seed: of sampling and bootstrap.
        threads: of all files together; 0 for all cores.
        parallel: sequences decoded side by side; None: by the size of their caches (`runner.parallel_for`).
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
    max_seconds: float | None = None
    keep_going: bool = False
    allow_quantized_base: bool = False
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    threads: int = 0
    parallel: int | None = None
    n_gpu_layers: int = 0
    extra_buffers: bool | None = None
    device: str = "auto"
    load_in: str | None = None
    work: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[FileFacts, ...] = ()

    @property
    def most_prompts(self) -> int:
        """Of one suite."""
        return MOST_PROMPTS if self.limit is None else self.limit

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
        names: of built-in suites; `default` for injection, refusal and code; `all` for every one;
            `drift` is always run and may be named.
        more: read from files.
        phrases: to look for: in `injection` if it is among the suites, else in every suite.

    Raises:
        SuiteError: an unknown name, or phrases without a suite to look in.
    """
    wanted = [name for name in names if name != "drift"]
    everything = [*BUILT_IN, *OPTIONAL]
    wanted = (
        everything if "all" in wanted else [one for name in wanted for one in (BUILT_IN if name == "default" else (name,))]
    )
    wanted = list(dict.fromkeys(wanted))
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


def reseeded(suite: Suite, seed: int) -> Suite:
    """A built-in suite whose generated prompts belong to a seed; any other suite as it is."""
    if suite.source is None or suite.name not in (*BUILT_IN, *OPTIONAL):
        return suite
    return replace(suite, source=built_in(suite.name, seed).source)


def limits_of(suites: Collection[str]) -> tuple[str, ...]:
    """What a pass does not say, with the suites of these names."""
    asked = [name for name in WIDER if name in suites]
    if not asked:
        return LIMITS
    left = ", ".join(name for name in WIDER if name not in asked)
    return (
        LIMITS[0],
        f"Beside {', '.join(asked)}, prompts are short, single-turn and mostly English; not asked: {left or 'none'}.",
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
    progress = progress or NoProgress()
    with base_as_gguf(request, progress) as ready:
        return _Run(ready, progress).run()


@contextmanager
def base_as_gguf(request: VerifyRequest, progress: Progress) -> Iterator[VerifyRequest]:
    """The request with a GGUF as base where a folder was given as the base of a GGUF.

    The GGUF is written into the work folder, and used again by the next run, or into a temporary folder.
    """
    base = request.base
    if not (base.is_dir() and request.candidate.is_file()):
        yield request
        return
    with ExitStack() as stack:
        if request.work is not None:
            request.work.mkdir(parents=True, exist_ok=True)
            weights = sorted(base.glob("*.safetensors"))
            outfile = request.work / f"base-{sha256_of([base / 'config.json', *weights])[:16]}.gguf"
        else:
            outfile = stack.enter_context(scratch_folder()) / f"{base.resolve().name}.gguf"
        if not outfile.is_file():
            progress.stage(f"Writing {base.name} as a GGUF", 0, "")
            from convert.hf.base import write_base_gguf  # torch

            with shared_path(outfile) as temporary:
                write_base_gguf(base, temporary)
        yield replace(request, base=outfile, names={"base": base.resolve().name, **request.names})


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
        suites, self.warnings = askable(request.suites, self.models["base"])
        self.request = replace(request, suites=suites)
        self.warnings += check_base(self.models["base"], allow_quantized=request.allow_quantized_base)
        for role, model in self.models.items():
            if role != "base":
                self.warnings += self.engine.check_pair(self.models["base"], model)
        self.started = time.perf_counter()
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
        with self._stage("prepare"):
            questions = prepare(self.models["base"], (), (request.texts or built_in_texts())[: request.limit])
        if questions.template is None and request.suites:
            self.warnings.append(NO_TEMPLATE)
        how, work = self._ask_settings(), WorkFolder(request.work)
        others = {role: model.path for role, model in self.models.items() if role != "base"}
        with self._stage("drift"):
            measured = drift_of(request.base, others, hashes, questions, how, work, self.progress)
        noise = float(np.mean(np.concatenate([part.kl for part in measured.pop("noise")])))
        rules = DriftRules(files["candidate"].file_type, request.max_kl, request.seed)
        drift, drift_check = drift_and_check(measured, noise, rules)
        runs, ended = self._ask(drift_check, questions, hashes, how, work)
        with self._stage("judge"):
            checks = [check for run in runs for check in with_evidence(run.answers(), run.found)]
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
            measured=self._measured(questions, runs, how),
            limits=(*limits_of([suite.name for suite in request.suites]), *self.engine.limits),
            warnings=tuple(self.warnings),
            advice=advice_on(checks),
            ended=ended,
        )

    def _ask(
        self, drift: Check, questions: Questions, hashes: Mapping[str, str], how: AskSettings, work: WorkFolder
    ) -> tuple[list[SuiteRun], str]:
        """The rounds; every suite with its checks, and why no more was asked."""
        request = self.request
        if drift.verdict is Verdict.FAIL and not request.keep_going:
            return [], "the file fails drift, so nothing was asked (--keep-going asks all the same)"
        most = request.most_prompts
        runs = [SuiteRun(suite, how.samples, request.seed, most, tuple(self.models)) for suite in request.suites]
        if not runs:
            return [], "no suite was asked for"
        files = Files(
            self.models["base"], {role: model.path for role, model in self.models.items()}, hashes, questions.template
        )
        budget = Budget(most, request.max_seconds, request.keep_going, self.started)
        loop = Loop(files, runs, how, work, budget, self.progress)
        with self._stage("answers"):
            ended = loop.run(request.margins, Errors.of(request.suites))
        self.speeds = {role: asker.speed for role, asker in loop.askers.items() if asker.speed is not None}
        return runs, ended

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
            self.engine.factory,
            request.parallel or parallel_for(self.models["base"].token_bytes),
            request.samples,
            Sampling(request.temperature, request.seed, stop_at_repeats=True),
            versions,
            self.engine.at_once,
        )

    def _tensors(self) -> tuple[TensorChange, ...]:
        if "plain" not in self.models:
            return ()
        with self._stage("tensors"):
            return self.engine.tensor_changes(self.models, self.request.threads or available_cores())

    def _measured(self, questions: Questions, runs: Sequence[SuiteRun], how: AskSettings) -> Measured:
        request = self.request
        prompts = {run.suite.name: len(run.prompts) for run in runs}
        return Measured(
            versions=all_versions(self.engine.packages),
            system=self.engine.system().strip(),
            machine=f"{platform.system()} {platform.machine()}",
            settings={
                **how.factory.describe(),
                "parallel": how.parallel,
                "files_at_once": how.at_once,
                "limit": request.limit,
                **request.margins.describe(),
                "max_prompts": request.most_prompts,
                "max_seconds": request.max_seconds,
                **{f"new_tokens.{run.suite.name}": run.suite.new_tokens for run in runs},
            },
            suites={**prompts, "drift": len(questions.documents)},
            samples=request.samples,
            temperature=request.temperature,
            seed=request.seed,
            chat_template=sha256(questions.template.source.encode()).hexdigest() if questions.template else None,
            seconds=dict(self.seconds),
            tokens_per_second=dict(self.speeds),
        )
