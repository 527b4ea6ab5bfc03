"""Child process in which llama.cpp runs a model and its activations are summed up.

Run as `python -m qguard_edge.runtimes.activations_worker JOB BYTES`, JOB being the file that
`qguard_edge.runtimes.activations.LlamaGramSource` writes, BYTES the limit of the address space (0: none). llama.cpp may abort on
a broken model, and its memory is its own, so it never runs in the caller's process. See `llama_child`.

    survey     one short text: which weights share an input, in which order they come
    passes     as many inputs, in the order of the graph, as fit into memory; all texts for each pass, the graph cut off behind
               the last input of the pass; then their files are written, and the index with them
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from convert.child import limit_process, resident_bytes
from qguard_edge.runtimes.activations_job import ActivationJob
from qguard_edge.runtimes.ggml_tensor import eval_callback, one_backend, operations
from qguard_edge.runtimes.gram_files import GramError, GramIndex, MeasuredInput, fewer_rows
from qguard_edge.runtimes.gram_passes import Unit, plan_passes, require_disk, resumed, stem_of, written
from qguard_edge.runtimes.gram_sums import Watcher, new_sums
from qguard_edge.runtimes.graph_inputs import GraphInput, GraphSurvey
from qguard_edge.runtimes.llama_child import tell
from qguard_edge.runtimes.llama_native import NativeModel
from quant_grids.errors import QGuardError

SURVEY_TOKENS = 16
SPARE = 32 << 20  # bytes kept free for what Python and BLAS allocate on the way


class ActivationRun:
    """One job with its model loaded.

    Args:
        job: what to do.
        report: told about progress, see `llama_child.tell`.
    """

    def __init__(self, job: ActivationJob, report: Callable[..., None] = tell) -> None:
        self.job, self.report = job, report
        self.folder = Path(job.folder)
        self.wanted = {weight.name: weight for weight in job.weights}
        self.rows = sorted(job.rows, key=len, reverse=True)
        self.watch: GraphSurvey | Watcher | None = None
        self.inputs: tuple[GraphInput, ...] = ()
        names = ["load", "decode", "decode_processor", "callback", "products", "products_processor", "passes"]
        names += ["anonymous_bytes", "peak_resident_bytes"]
        self.figures = dict.fromkeys(names, 0.0) | {"tokens": float(sum(map(len, job.rows)))}
        operations()
        # One C callback for all passes: llama.cpp takes it once, with the context.
        self.callback = eval_callback(lambda address, ask: bool(self.watch and self.watch(address, ask)))
        started = time.perf_counter()
        length = len(self.rows[0])
        self.model = NativeModel(
            Path(job.model),
            n_ctx=length,
            n_threads=job.threads,
            n_seq=max(1, min(job.batch // length, len(self.rows), 64)),
            n_gpu_layers=job.gpu_layers,
            n_batch=job.batch,
            exact=job.exact,
            on_node=self.callback,
        )
        self.figures["load"] = time.perf_counter() - started
        if job.gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            report(note="this build of llama.cpp has no GPU support: the model runs on the CPU")
        largest = max(max(row) for row in self.rows)
        if largest >= self.model.n_vocab:
            raise GramError(f"the text holds token {largest}, the model has {self.model.n_vocab}")

    def run(self) -> None:
        """Survey, then pass after pass."""
        survey = GraphSurvey(self.wanted)
        self.watch = survey
        self._decode([self.rows[0][: min(SURVEY_TOKENS, self.model.n_batch)]])
        self.inputs = survey.inputs()
        entries = tuple(self._entry(found) for found in self.inputs)
        index = GramIndex(self.job.key, self.job.products, entries, survey.skipped, survey.missing())
        index = resumed(index, self.folder)
        require_disk(index, self.folder)
        passes = plan_passes(index, self._budget(survey.largest))
        self.report(total=len(passes) * sum(map(len, self.rows)))
        for units in passes:
            index = self._pass(index, units)
        self._save(index)

    def _entry(self, found: GraphInput) -> MeasuredInput:
        """An input of which nothing is measured yet."""
        rows = int(self.figures["tokens"]) * found.slots
        kept = fewer_rows(rows, found.columns, found.slices) if found.routed and self.job.products else 0
        return MeasuredInput(found.weights, found.columns, found.slices, found.routed, kept_rows=kept)

    def _keep(self, index: GramIndex, unit: Unit) -> Path | None:
        """Where a unit's rows are kept, if they are."""
        return self.folder / stem_of(unit) if index.inputs[unit.position].kept_rows else None

    def _budget(self, largest: int) -> int | None:
        """Bytes for Gram matrices; None: no limit.

        Args:
            largest: bytes of the survey's largest input.
        """
        if self.job.max_memory is None:
            return None
        self.watch = None
        self._decode(self.rows[: self.model.n_seq])  # only now llama.cpp's own memory is in use
        # An input may have to be copied, and gathered by expert.
        copies = 2 * largest * self.job.batch // min(SURVEY_TOKENS, len(self.rows[0]))
        return self.job.max_memory - resident_bytes("RssAnon") - copies - SPARE

    def _pass(self, index: GramIndex, units: Sequence[Unit]) -> GramIndex:
        """All texts once; returns the index with the new pieces."""
        all_sums = [new_sums(unit, self.job.products, self._keep(index, unit)) for unit in units]
        self.watch = watcher = Watcher(self.wanted, self.inputs, all_sums, copy=self.job.copy, stop=one_backend())
        self.forward()
        for name, seconds in watcher.seconds.items():
            self.figures[name] += seconds
        self.figures["passes"] += 1
        self.figures["anonymous_bytes"] = max(self.figures["anonymous_bytes"], resident_bytes("RssAnon"))
        for sums in all_sums:
            sums.finish()
            index = written(index, self.folder, sums.unit, sums.rows, sums.squares.astype(np.float32), sums.gram)
            sums.release()
        self._save(index)
        return index

    def forward(self) -> None:
        """Run the model on all texts, with whatever watches it."""
        for start in range(0, len(self.rows), self.model.n_seq):
            texts = self.rows[start : start + self.model.n_seq]
            self._decode(texts)
            self.report(advance=sum(map(len, texts)))

    def _save(self, index: GramIndex) -> None:
        self.figures["peak_resident_bytes"] = resident_bytes("VmHWM")
        self.figures["processor"] = time.process_time()
        dataclasses.replace(index, figures=self.figures).save(self.folder)

    def _decode(self, batch: Sequence[Sequence[int]]) -> None:
        """Run some texts side by side, each in a sequence of its own."""
        self.model.reset()
        if isinstance(self.watch, Watcher):
            self.watch.begin()
        step = max(1, self.model.n_batch // len(batch))
        started, used = time.perf_counter(), time.process_time()
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
        self.figures["decode_processor"] += time.process_time() - used


def main() -> None:
    """Entry point of the child process."""
    limits = int(sys.argv[2])
    limit_process(memory=None if limits == 0 or llama_cpp.llama_supports_gpu_offload() else limits)
    try:
        ActivationRun(ActivationJob.load(Path(sys.argv[1]))).run()
    except QGuardError as error:
        tell(error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
