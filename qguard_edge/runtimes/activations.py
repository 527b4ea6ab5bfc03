"""Gram matrices from llama.cpp: the base GGUF runs in a child process, watched through the evaluation callback.

This is what llama-imatrix does, with whole matrices instead of diagonals. It needs no transformers, sees every architecture that
llama.cpp runs, mixtures of experts among them, and takes the memory of a mapped file. See `activations_worker` for the child.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.child import resident_bytes
from convert.cores import available_cores
from convert.gguf_file import GgufModel
from convert.llama_limits import ChildLimits
from convert.scratch import scratch_folder
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.activations_job import ActivationJob, job_key
from qguard_edge.runtimes.gram_files import GramError, WantedWeight, load_index
from qguard_edge.runtimes.gram_passes import forget_others
from qguard_edge.runtimes.grams import Grams
from qguard_edge.runtimes.llama_child import Event, run_child

BATCH = 512
"""Tokens of one graph: enough for the products to be efficient, few enough for all their logits to be small."""
WAY_OUT = "--defense ortho needs no activations"


@dataclass(frozen=True)
class LlamaGramSource:
    """A `GramSource` on a full-precision GGUF.

    Attributes:
        base: the model, one file or the first shard of several.
        products: Gram matrices; False: sums of squares alone, at a fraction of the cost.
        gpu_layers: layers that llama.cpp offloads.
        batch: tokens of one graph.
        identity: of the model, such as its SHA-256, for sums that an interrupted run has left; empty: its files' names and times.
        way_out: ends the message when the model cannot be run; may be empty.
        exact: keep keys and values in f32 and use plain attention, to compare with other programs.
        copy: fetch inputs through their backend even where they lie in the host's memory, as a GPU's must be.
    """

    base: GgufModel
    products: bool = True
    gpu_layers: int = 0
    batch: int = BATCH
    identity: str = ""
    way_out: str = WAY_OUT
    exact: bool = False
    copy: bool = False

    def collect(
        self,
        weights: Sequence[WantedWeight],
        texts: Sequence[Sequence[int]],
        folder: Path,
        *,
        max_memory: int | None = None,
        threads: int = 0,
        progress: Progress | None = None,
    ) -> Grams:
        """See `GramSource.collect`."""
        rows = tuple(tuple(map(int, text)) for text in texts if len(text))
        if not rows or not weights:
            raise GramError("there is no text to see activations on" if weights else "there is no weight to see inputs of")
        named = None if self.identity else self.base
        if max_memory is not None:
            # This process stands beside the child for as long as that runs, and takes nothing more meanwhile.
            max_memory -= resident_bytes("RssAnon")
        key = job_key(named, weights, rows, self.identity, self.products, self.batch, self.gpu_layers, self.exact)
        job = ActivationJob(
            key, str(self.base.path), str(folder), tuple(weights), rows, self.products, threads or available_cores(),
            self.batch, max_memory, self.gpu_layers, self.exact, self.copy,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        forget_others(folder, key)
        index = load_index(folder)
        if index is None or not index.complete:
            self._run(job, progress or NoProgress())
        return Grams(folder)

    def _run(self, job: ActivationJob, progress: Progress) -> None:
        def on_event(event: Event) -> None:
            if "total" in event:
                progress.stage("Seeing activations in llama.cpp", int(event["total"]), "tokens")
            elif "advance" in event:
                progress.advance(int(event["advance"]))
            elif "note" in event:
                progress.note(str(event["note"]))

        with scratch_folder() as place:
            path = place / "job.json"
            job.save(path)
            limits = ChildLimits.of(self.base.path, threads=job.threads, more=math.inf)  # the sums may take what there is
            reason = run_child(
                "qguard_edge.runtimes.activations_worker", path, limits=limits, threads=job.threads, on_event=on_event
            )
        if reason:
            raise GramError("; ".join(filter(None, (f"no activations of {self.base.path.name}: {reason}", self.way_out))))
