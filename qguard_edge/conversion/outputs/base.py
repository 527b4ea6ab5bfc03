"""What an output fills in for the run (`qguard_edge.conversion.run`), and what the stages hand to each other."""

from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from convert.gguf_file import GgufFile, GgufModel
from convert.outputs import Written, check_outputs, files_of
from convert.source import Source, resolve_source
from qguard_edge.conversion.activations import Activations
from qguard_edge.conversion.report import ConversionReport, Report
from qguard_edge.conversion.request import ConversionRequest
from qguard_edge.defenses.base import Defense
from qguard_edge.learned.matrices import Target
from qguard_edge.learned.memory import ModelSize
from qguard_edge.learned.settings import LearnReport
from qguard_edge.progress import Clock, Progress
from qguard_edge.runtimes.load_check import LoadCheck
from qguard_edge.verify.results import Verification

Request = TypeVar("Request", bound=ConversionRequest)
TensorTypes = tuple[tuple[str, str], ...]
"""`--tensor-type` pairs that llama.cpp is to follow before the user's own."""


class Gate(Protocol):
    """Verifies a finished output before it gets its name (`qguard_edge.verify.gate`)."""

    def __call__(self, candidate: Path, base: Path, plain: Path, outfile: Path, /) -> Verification:
        """Compare the candidate with its base; plain rounding (for a folder: the base itself) stands beside it.

        `outfile` is the name that the candidate will get.
        """


class Guard(Protocol):
    """Scans a model before it is rounded, and may refuse it by raising (`qguard_edge.scan.guard`)."""

    def before(self, base: GgufModel) -> TensorTypes:
        """Scan the base."""

    def after(self, base: GgufModel, plain: GgufFile) -> TensorTypes:
        """Scan it again for the types that llama.cpp chose; if this returns anything, llama.cpp quantizes once more."""

    def folder(self, source: Source, kinds: tuple[str, ...]) -> None:
        """Scan a model folder that is to be rounded to formats of bitsandbytes."""


@dataclass
class Job:
    """State of one run.

    Attributes:
        work: the hidden folder beside the output.
        progress: of the stages.
        clock: wall time per stage.
        seed: of everything random.
        defense: the rule.
        device: where arithmetic runs.
        base_hash: SHA-256 of the base, being computed.
        learned: what a learned defense reported.
        activations: what is known of the inputs of matrices, for a defense that wants it.
        loaded: the load check's answer.
    """

    work: Path
    progress: Progress
    clock: Clock
    seed: int
    defense: Defense[Any]
    device: torch.device
    base_hash: "Future[str]"
    learned: LearnReport | None = None
    activations: Activations | None = None
    loaded: LoadCheck | None = None


class Output(ABC, Generic[Request, Report]):
    """One kind of output. The run calls the methods in the order in which they stand here, each once.

    Attributes:
        request: what the user asked for.
        source: the model; known after `open`.
        outfile: the final name; known after `open`.
        warnings: one sentence each, of `open`.
    """

    noun = "file"  # for messages
    runtime = "llama.cpp"  # what the load check loads it in
    rounds = True  # whether anything is rounded, so that there is something to scan, to choose and to verify
    loads = True  # whether the output can be loaded by itself
    source: Source
    outfile: Path

    def __init__(self, request: Request) -> None:
        self.request = request
        self.warnings: list[str] = []

    def open(self) -> None:
        """Find the model and rule out every way to fail, short of a disk error, without writing anything."""
        self.source = resolve_source(self.request.model, self.request.revision)
        self.outfile = self.choose_name()

    @abstractmethod
    def choose_name(self) -> Path:
        """The output's final name, checked."""

    def check_names(self, outfile: Path) -> None:
        """Refuse names that cannot be written, or would replace something against the user's will.

        Args:
            outfile: the output's name; the files beside it are checked as well.

        Raises:
            OutputError: naming the path and the way out.
        """
        names = [Written(path) for path in (outfile, *self.files_beside(outfile))]
        check_outputs(names, self.inputs(), overwrite=self.request.overwrite)

    def files_beside(self, outfile: Path) -> tuple[Path, ...]:
        """Files that are written beside the output."""
        return ()

    def inputs(self) -> tuple[Path | None, ...]:
        """Files and folders that the conversion reads and must not replace."""
        text = self.request.calibration
        return (self.source.path, text.file, text.add)

    @abstractmethod
    def make_base(self, work: Path, progress: Progress) -> tuple[str, ...]:
        """Have the full-precision model at hand, written to `work` if need be; returns warnings."""

    @abstractmethod
    def base_files(self) -> list[Path]:
        """The files of the base, in order."""

    def scan(self, guard: Guard) -> None:
        """Let the guard look at the base."""

    @abstractmethod
    def size(self) -> ModelSize:
        """Of the model, for the estimates of learning."""

    def see_activations(self, job: Job) -> Activations | None:
        """The inputs of the matrices, for a defense that wants them; None where no such defense is offered."""
        return None

    def plain_wants_inputs(self) -> bool:
        """Whether plain rounding, too, needs to know the inputs of the matrices, so that they are to be seen before it."""
        return False

    def make_plain(self, job: Job, guard: Guard | None) -> None:
        """Have llama.cpp's own quantization at hand."""

    def model_path(self) -> Path:
        """The model that learning runs: the one that the user gave."""
        return self.source.path

    def target(self) -> Target | None:
        """The matrices that learning rounds; None where no learned defense is offered."""
        return None

    @abstractmethod
    def write(self, job: Job) -> Path:
        """Choose the rounding, write the output into the work folder, and check it; returns where it lies."""

    @abstractmethod
    def load(self, made: Path) -> LoadCheck:
        """Load the output as a user would."""

    def measure(self, job: Job, made: Path) -> None:
        """Measure how near the output is to full precision, where that is asked for and costs little; by default not."""

    def compared_with(self) -> tuple[Path, Path]:
        """What `--verify` compares with: the base, and plain rounding (a folder: the base itself)."""
        return self.source.path, self.source.path

    def divide(self, made: Path, outfile: Path) -> Path:
        """Cut the finished output into the files that it is to consist of, still in the work folder; returns the first."""
        return made

    @abstractmethod
    def hashes(self, job: Job, made: Path) -> dict[str, str]:
        """SHA-256 of the files."""

    @abstractmethod
    def name(self, made: Path, outfile: Path) -> Path:
        """Give the output its name, in one step; returns it (of a split output, that of the first shard)."""

    def entropy_bits(self) -> float:
        """Entropy of the random choices, over all matrices, where the rule measures it."""
        return 0.0

    def late_warnings(self) -> list[str]:
        """What became clear on the way, one sentence each."""
        return []

    @abstractmethod
    def base_bytes(self) -> int:
        """Size of the base's tensors."""

    def out_bytes(self, outfile: Path) -> int:
        """Size of the output."""
        return sum(file.stat().st_size for file in files_of(outfile))

    @abstractmethod
    def report(self, common: ConversionReport) -> Report:
        """The report, from what all outputs have in common."""
