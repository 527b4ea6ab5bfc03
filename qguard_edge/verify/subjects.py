"""What can be verified, and what runs it: the seam between the verifier and llama.cpp or transformers.

A `Subject` is a model on disk (a GGUF, or a Hugging Face folder): its facts, its chat template, its
tokenizer. An `Engine` belongs to one kind of subject and has everything else that depends on the kind: whether two
subjects belong together, and how they are loaded (its `RunnerFactory`, see `qguard_edge.verify.runner`). Suites, drift,
statistics, verdicts and reports use only these protocols.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from qguard_edge.verify.chat import ChatTemplate
from qguard_edge.verify.files import Role
from qguard_edge.verify.results import FileFacts, TensorChange
from qguard_edge.verify.runner import RunnerFactory


class TextTokenizer(Protocol):
    """A tokenizer."""

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids.

        Args:
            text: to be read.
            add_special: with what the tokenizer puts around plain text (a begin token, for most).
            parse_special: read `<|im_start|>` and the like as control tokens.
        """

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""


class Subject(Protocol):
    """A model on disk."""

    @property
    def path(self) -> Path:
        """File (first shard of a split one) or folder."""

    @property
    def context_length(self) -> int:
        """Tokens the model was made for; a large number where that is not recorded."""

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that a token takes in the cache; 0 where that is not known."""

    def facts(self, role: Role, name: str | None = None) -> FileFacts:
        """What it is; `name` where the report should show another one than its own. Reads every byte."""

    def template(self) -> ChatTemplate | None:
        """Its chat template, or None."""

    def vocabulary(self) -> AbstractContextManager[TextTokenizer]:
        """Its tokenizer, without its weights."""

    @property
    def quantized(self) -> bool:
        """Its weights are quantized, at least some."""


class Engine(Protocol):
    """Everything about one kind of subject that is not the subject itself."""

    @property
    def factory(self) -> RunnerFactory:
        """Loads subjects, all in the same way."""

    @property
    def at_once(self) -> int:
        """How many models it runs at the same time, each on its share of the cores."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Whose versions decide the numbers."""

    @property
    def limits(self) -> tuple[str, ...]:
        """Limits of the verdict that come from where it was measured, one sentence each."""

    def open(self, path: Path) -> Subject:
        """Read the facts of a model.

        Raises:
            QGuardError: it is no sound model of this kind.
        """

    def identity(self, role: str, facts: FileFacts) -> str:
        """What decides the answers of a role besides the prompts: its hash, and how it is changed while it is loaded."""

    def check_pair(self, base: Subject, other: Subject) -> list[str]:
        """Refuse subjects that cannot be compared; warnings, one sentence each.

        Raises:
            PairError: another architecture or another tokenizer: the same token ids would mean different texts.
        """

    def system(self) -> str:
        """Processor features and build, in one line."""

    def running(self) -> AbstractContextManager[object]:
        """Around the whole measurement: thread counts and the like."""

    def tensor_changes(self, subjects: Mapping[str, Subject], threads: int) -> tuple[TensorChange, ...]:
        """Codes chosen anew per tensor, with `plain`, `candidate` and `base`; empty where it cannot be determined."""
