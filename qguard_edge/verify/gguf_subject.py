"""GGUF files, which llama.cpp runs: see `qguard_edge.verify.subjects`."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from convert.gguf_file import GgufModel
from qguard_edge.runtimes.llama import LlamaModel, system_info
from qguard_edge.verify.chat import ChatTemplate, template_of
from qguard_edge.verify.files import Role, check_pair, model_facts, quantized_tensors, tensor_changes
from qguard_edge.verify.results import FileFacts, TensorChange
from qguard_edge.verify.runner import LlamaFactory
from qguard_edge.verify.subjects import Subject

NO_LIMIT = 1 << 20
_KEYS_AND_VALUES = (".attn_k.weight", ".attn_v.weight")
LLAMA_LIMITS = ("It was measured with this build of llama.cpp on this machine; other kernels round differently.",)


class GgufSubject:
    """A GGUF file; a `Subject`.

    Args:
        path: the file, or the first shard of a split one.

    Raises:
        FormatError: it is not a sound GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.model = GgufModel(path)

    @property
    def path(self) -> Path:
        """See `Subject.path`."""
        return self.model.path

    @property
    def context_length(self) -> int:
        """See `Subject.context_length`."""
        return self.model.first.count(f"{self.model.architecture}.context_length", NO_LIMIT)

    @property
    def token_bytes(self) -> int:
        """See `Subject.token_bytes`: half precision, as llama.cpp's caches are."""
        return 2 * sum(tensor.rows for name, tensor in self.model.tensors.items() if name.endswith(_KEYS_AND_VALUES))

    def facts(self, role: Role, name: str | None = None) -> FileFacts:
        """See `Subject.facts`."""
        return model_facts(role, self.model, name)

    def template(self) -> ChatTemplate | None:
        """See `Subject.template`."""
        return template_of(self.model.first)

    def vocabulary(self) -> LlamaModel:
        """See `Subject.vocabulary`."""
        return LlamaModel(self.path, vocab_only=True)

    @property
    def quantized(self) -> bool:
        """See `Subject.quantized`."""
        return quantized_tensors(self.model) > 0


@dataclass(frozen=True)
class GgufEngine:
    """llama.cpp; an `Engine`.

    Attributes:
        factory: how it loads files.
        at_once: see `Engine.at_once`; the threads of the factory are those of one file.
    """

    factory: LlamaFactory
    at_once: int = 1
    packages: tuple[str, ...] = ("llama-cpp-python",)
    limits: tuple[str, ...] = LLAMA_LIMITS

    def open(self, path: Path) -> GgufSubject:
        """See `Engine.open`."""
        return GgufSubject(path)

    def identity(self, role: str, facts: FileFacts) -> str:
        """See `Engine.identity`."""
        return facts.sha256

    def check_pair(self, base: Subject, other: Subject) -> list[str]:
        """See `Engine.check_pair`."""
        return check_pair(_model(base), _model(other))

    def system(self) -> str:
        """See `Engine.system`."""
        return system_info()

    def running(self) -> AbstractContextManager[object]:
        """See `Engine.running`: llama.cpp is told its threads when it loads a file."""
        return nullcontext()

    def tensor_changes(self, subjects: Mapping[str, Subject], threads: int) -> tuple[TensorChange, ...]:
        """See `Engine.tensor_changes`."""
        plain, candidate, base = (_model(subjects[role]) for role in ("plain", "candidate", "base"))
        return tensor_changes(plain, candidate, base, threads)


def _model(subject: Subject) -> GgufModel:
    assert isinstance(subject, GgufSubject)  # an engine opens its subjects itself
    return subject.model
