"""What `activations.LlamaGramSource` asks its child process `activations_worker` to do."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from convert.gguf_file import GgufModel
from qguard_edge.runtimes.gram_files import WantedWeight


@dataclass(frozen=True)
class ActivationJob:
    """One run over a text.

    Attributes:
        key: identifies model, text and weights; see `job_key`.
        model: the base GGUF, first shard of a split one.
        folder: for the sums.
        weights: whose inputs are wanted.
        rows: token ids.
        products: Gram matrices, or the sums of squares alone.
        threads: of llama.cpp and of BLAS.
        batch: tokens of one graph.
        max_memory: bytes of this process beyond the mapped file; None: no limit.
        gpu_layers: offloaded.
        exact: keys and values in f32, plain attention.
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
    exact: bool
    copy: bool

    def save(self, path: Path) -> None:
        """Write it for `load`."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "ActivationJob":
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        content["weights"] = tuple(WantedWeight(**weight) for weight in content["weights"])
        content["rows"] = tuple(tuple(row) for row in content["rows"])
        return cls(**content)


def job_key(base: GgufModel | None, weights: object, rows: object, *settings: object) -> str:
    """Equal for two jobs with the same sums. Files count by name, size and time, so that nothing large is read."""
    files = [(shard.path.name, shard.size, shard.path.stat().st_mtime_ns) for shard in (base.shards if base else ())]
    return hashlib.sha256(repr((files, weights, rows, settings)).encode()).hexdigest()
