"""Child process in which llama.cpp runs a model and its activations are summed up.

Run as `python -m qguard_edge.runtimes.activations_worker JOB`, JOB being the file that
`qguard_edge.runtimes.activations.LlamaGramSource` writes. llama.cpp may abort on a broken model, and its memory is its own, so
it never runs in the caller's process. Lines of JSON behind `MARK` on standard output tell how far it is; all else is log.

    survey     one short text: which weights share an input, in which order they come
    passes     as many inputs, in the order of the graph, as fit into memory; all texts for each pass, the graph cut off behind
               the last input of the pass; then their files are written, and the index with them
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.child import die_with_parent, resident_bytes
from qguard_edge.llama_runtime import LlamaModel
from qguard_edge.runtimes.ggml_tensor import eval_callback, operations
from qguard_edge.runtimes.gram_files import GramIndex, MeasuredInput, Piece, WantedWeight, load_index, write_array
from qguard_edge.runtimes.gram_sums import ActivationsError, Sums, Unit, Watcher, new_sums
from qguard_edge.runtimes.graph_inputs import GraphInput, Survey
from quant_grids.errors import QGuardError

MARK = "@activations "
SURVEY_TOKENS = 16
SPARE = 32 << 20  # bytes kept free for what Python and BLAS allocate on the way


@dataclass(frozen=True)
class Job:
    """What the child is to do.

    Attributes:
        key: identifies model, text and weights.
        model: the base GGUF, first shard of a split one.
        folder: for the sums.
        weights: whose inputs are wanted.
        rows: token ids.
        products: Gram matrices, or the sums of squares alone.
        threads: of llama.cpp and of BLAS.
        batch: tokens of one graph.
        max_memory: bytes of this process beyond the mapped file; None: no limit.
        gpu_layers: offloaded.
        copy: fetch inputs through their backend even where they lie in the host's memory.
    """

    key: str
    model: str
    folder: str
    weights: tuple[WantedWeight, ...]
    rows: tuple[tuple[int, ...], ...]
    products: bool
    threads: int
    batch: int
    max_memory: int | None
    gpu_layers: int
    copy: bool

    @classmethod
    def load(cls, path: Path) -> "Job":
        """Read what `dataclasses.asdict` made."""
        content = json.loads(path.read_text(encoding="utf-8"))
        content["weights"] = tuple(WantedWeight(**weight) for weight in content["weights"])
        content["rows"] = tuple(tuple(row) for row in content["rows"])
        return cls(**content)


def tell(**event: Any) -> None:
    """One line for the parent."""
    sys.stdout.write(MARK + json.dumps(event) + "\n")
    sys.stdout.flush()


class Runner:
    """One job with its model loaded."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = Path(job.folder)
        self.wanted = {weight.name: weight for weight in job.weights}
        self.rows = sorted(job.rows, key=len, reverse=True)
        self.watch: Survey | Watcher | None = None
        self.inputs: tuple[GraphInput, ...] = ()
        self.figures = {"load": 0.0, "decode": 0.0, "callback": 0.0, "products": 0.0, "passes": 0.0}
        operations()
        # One C callback for all passes: llama.cpp takes it once, with the context.
        self.callback = eval_callback(lambda address, ask: bool(self.watch and self.watch(address, ask)))
        started = time.perf_counter()
        length = len(self.rows[0])
        self.model = LlamaModel(
            Path(job.model),
            n_ctx=length,
            n_threads=job.threads,
            n_seq=max(1, min(job.batch // length, len(self.rows), 64)),
            n_gpu_layers=job.gpu_layers,
            n_batch=job.batch,
            on_node=self.callback,
        )
        self.figures["load"] = time.perf_counter() - started
        largest = max(max(row) for row in self.rows)
        if largest >= self.model.n_vocab:
            raise ActivationsError(f"the text holds token {largest}, the model has {self.model.n_vocab}")

    def run(self) -> None:
        """Survey, then pass after pass."""
        survey = Survey(self.wanted)
        self.watch = survey
        self._decode([self.rows[0][:SURVEY_TOKENS]])
        self.inputs = inputs = survey.inputs()
        done = {found.weights[0]: found for found in self._done()}
        units = self._plan(inputs, done, survey.largest)
        tell(total=len(units) * sum(map(len, self.rows)), passes=len(units))
        measured = [MeasuredInput(i.weights, i.columns, i.slices, i.routed) for i in inputs]
        measured = [done.get(entry.weights[0], entry) for entry in measured]
        index = GramIndex(self.job.key, self.job.products, tuple(measured), survey.skipped, survey.missing())
        self._save(index)
        for number, chosen in enumerate(units):
            index = self._pass(index, chosen, number)
        self._save(index)

    def _done(self) -> tuple[MeasuredInput, ...]:
        """What an earlier run of the same job has left."""
        index = load_index(self.folder)
        return index.inputs if index is not None and index.job == self.job.key else ()

    def _save(self, index: GramIndex) -> None:
        self.figures["tokens"] = sum(map(len, self.rows))
        self.figures["peak_resident_bytes"] = resident_bytes("VmHWM")
        dataclasses.replace(index, figures=self.figures).save(self.folder)

    def _plan(self, inputs: Sequence[GraphInput], done: dict[str, MeasuredInput], largest: int) -> list[list[Unit]]:
        """Cut what is still to be measured into passes that fit into memory."""
        budget = self._budget(largest)
        passes: list[list[Unit]] = []
        left = 0
        for entry in inputs:
            first = done[entry.owner].measured if entry.owner in done else 0
            each = Unit(entry, 0, 1).gram_bytes if self.job.products else 0
            if each > budget:
                raise ActivationsError(
                    f"the Gram matrix of {entry.owner} takes {each >> 20} MiB, memory for {max(0, budget) >> 20} MiB is left of "
                    f"the {(self.job.max_memory or 0) >> 20} MiB that are allowed; raise --max-memory"
                )
            while first < entry.slices:
                count = entry.slices - first
                if each:
                    count = min(count, left // each)
                if count == 0 or not passes:
                    passes.append([])
                    left = budget
                    continue
                passes[-1].append(Unit(entry, first, count))
                left -= each * count
                first += count
        return passes

    def _budget(self, largest: int) -> int:
        """Bytes for Gram matrices."""
        if self.job.max_memory is None or not self.job.products:
            return 1 << 62
        self.watch = None
        for batch in batches(self.rows[: self.model.n_seq], self.model.n_seq):
            self._decode(batch)  # llama.cpp's own memory is in use only after this
        # An input may have to be copied, and gathered by expert.
        return self.job.max_memory - resident_bytes("RssAnon") - 2 * largest * self.job.batch // SURVEY_TOKENS - SPARE

    def _pass(self, index: GramIndex, units: Sequence[Unit], number: int) -> GramIndex:
        """All texts once; returns the index with the new pieces."""
        sums = [new_sums(unit, self.job.products) for unit in units]
        self.watch = watcher = Watcher(self.wanted, self.inputs, sums, self.job.copy)
        for batch in batches(self.rows, self.model.n_seq):
            self._decode(batch)
            tell(advance=sum(map(len, batch)), detail=f"pass {number + 1}")
        for name, seconds in watcher.seconds.items():
            self.figures[name] += seconds
        self.figures["passes"] += 1
        self.figures["anonymous_bytes"] = max(self.figures.get("anonymous_bytes", 0), resident_bytes("RssAnon"))
        for entry in sums:
            index = self._write(index, entry)
        self._save(index)
        return index

    def _write(self, index: GramIndex, sums: Sums) -> GramIndex:
        """Write one unit's files."""
        unit = sums.unit
        sums.finish()
        if not np.isfinite(sums.squares).all():
            raise ActivationsError(f"the inputs of {unit.input.owner} are not finite numbers: the model is broken")
        position = [entry.weights[0] for entry in index.inputs].index(unit.input.owner)
        stem = f"{position:05d}-{unit.first:04d}"
        write_array(self.folder / f"{stem}.squares", sums.squares.astype(np.float32))
        if sums.gram is not None:
            write_array(self.folder / f"{stem}.gram", sums.gram)
            sums.gram = None
        piece = Piece(stem, unit.first, tuple(int(count) for count in sums.rows))
        inputs = list(index.inputs)
        inputs[position] = dataclasses.replace(inputs[position], pieces=(*inputs[position].pieces, piece))
        return dataclasses.replace(index, inputs=tuple(inputs))

    def _decode(self, batch: Sequence[Sequence[int]]) -> None:
        """Run some texts side by side, each in a sequence of its own."""
        self.model.reset()
        if isinstance(self.watch, Watcher):
            self.watch.begin()
        step = max(1, self.model.n_batch // len(batch))
        started = time.perf_counter()
        for start in range(0, len(batch[0]), step):
            rows = [
                (token, start + i, sequence, True)
                for sequence, row in enumerate(batch)
                for i, token in enumerate(row[start : start + step])
            ]
            self.model.decode(rows)
            if isinstance(self.watch, Watcher) and self.watch.error is not None:
                raise self.watch.error
        self.figures["decode"] += time.perf_counter() - started


def batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[Sequence[Sequence[int]]]:
    """`size` rows at a time; the first of each batch is its longest."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def main() -> None:
    """Entry point of the child process."""
    die_with_parent()
    try:
        Runner(Job.load(Path(sys.argv[1]))).run()
    except QGuardError as error:
        tell(error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
