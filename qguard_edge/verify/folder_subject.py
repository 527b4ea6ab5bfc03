"""Hugging Face folders, which transformers runs: see `qguard_edge.verify.subjects`.

The candidate is a folder that is quantized already (`convert --to nf4`, `fp4`, `int8`), or one of full precision that
bitsandbytes rounds while it is loaded (`convert --to hf`, verified with `--load-in nf4`); the base is the full-precision
folder it was made from. Only safetensors are read, no remote code is run.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from convert.hashes import sha256_of
from convert.hf.jsonfile import read_json, read_optional_json
from convert.hf_folder import RECORD_NAME
from qguard_edge.runtimes.bnb import load_exactly
from qguard_edge.runtimes.devices import torch_threads
from qguard_edge.runtimes.hf import HfTokenizer, end_tokens, load_tokenizer
from qguard_edge.runtimes.hf_runner import HfRunner
from qguard_edge.verify.chat import LONGEST_TEMPLATE, ChatTemplate, TemplateError
from qguard_edge.verify.files import PairError, Role
from qguard_edge.verify.results import FileFacts, TensorChange
from qguard_edge.verify.runner import sequences
from qguard_edge.verify.subjects import Subject
from quant_grids.errors import FormatError

NO_LIMIT = 1 << 20
_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class FolderSubject:
    """A Hugging Face folder; a `Subject`.

    Args:
        path: the folder.
        load_in: format in which bitsandbytes rounds it while it is loaded, unless it is the base or quantized already.

    Raises:
        FormatError: it has no config.json or no .safetensors, or the config cannot be read.
    """

    def __init__(self, path: Path, load_in: str | None = None) -> None:
        self.path, self.load_in = path, load_in
        if not (path / "config.json").is_file():
            raise FormatError(f"{path.name} is no model folder: it has no config.json")
        self.config = read_json(path / "config.json")
        self.weights = sorted(path.glob("*.safetensors"))
        if not self.weights:
            raise FormatError(f"{path.name} holds no .safetensors file; only these are read")

    @property
    def architecture(self) -> str:
        """`model_type` of the config."""
        return str(self.config.get("model_type", "unknown"))

    @property
    def context_length(self) -> int:
        """See `Subject.context_length`."""
        found = self.config.get("max_position_embeddings")
        return found if isinstance(found, int) and found > 0 else NO_LIMIT

    @property
    def token_bytes(self) -> int:
        """See `Subject.token_bytes`."""
        return 0

    def rounded_in(self, role: str) -> str | None:
        """Format in which bitsandbytes rounds the folder while it is loaded for a role."""
        return None if role == "base" or "quantization_config" in self.config else self.load_in

    def file_type(self, role: str) -> str | None:
        """Such as NF4, INT8 or BF16; None where the config has no type."""
        if rounded := self.rounded_in(role):
            return rounded.upper()
        quantized = self.config.get("quantization_config")
        if isinstance(quantized, Mapping):
            return "INT8" if quantized.get("load_in_8bit") else str(quantized.get("bnb_4bit_quant_type", "unknown")).upper()
        return _TYPES.get(str(self.config.get("dtype", self.config.get("torch_dtype"))))

    def facts(self, role: Role, name: str | None = None) -> FileFacts:
        """See `Subject.facts`; the hash is that of all .safetensors in the order of their names."""
        recorded = read_optional_json(self.path / RECORD_NAME)
        return FileFacts(
            role=role,
            name=name or self.path.resolve().name,
            sha256=sha256_of(self.weights),
            size=sum(path.stat().st_size for path in self.weights),
            file_type=self.file_type(role),
            architecture=self.architecture,
            qguard={key: value if isinstance(value, str) else json.dumps(value) for key, value in recorded.items()},
        )

    def template(self) -> ChatTemplate | None:
        """See `Subject.template`.

        Raises:
            TemplateError: it is absurdly long.
        """
        tokenizer = load_tokenizer(self.path)
        if not tokenizer.template:
            return None
        if len(tokenizer.template) > LONGEST_TEMPLATE:
            raise TemplateError(f"{self.path.name}: its chat template has more than {LONGEST_TEMPLATE} characters")
        return ChatTemplate(tokenizer.template, tokenizer.begin, tokenizer.end)

    @contextmanager
    def vocabulary(self) -> Iterator[HfTokenizer]:
        """See `Subject.vocabulary`."""
        yield load_tokenizer(self.path)

    @property
    def quantized(self) -> bool:
        """See `Subject.quantized`."""
        return "quantization_config" in self.config


@dataclass(frozen=True)
class FolderFactory:
    """How transformers loads folders; a `RunnerFactory`.

    Attributes:
        device: where they run; f32 on a CPU, the folder's own type elsewhere.
        load_in: see `FolderSubject`.
        threads: of torch; for the report.
    """

    device: torch.device
    load_in: str | None
    threads: int
    _loaded: WeakValueDictionary[tuple[Path, str | None], Any] = field(default_factory=WeakValueDictionary, compare=False)
    """Loaded models that are in use, so that the noise floor's second reader needs no second copy."""

    def open(
        self, path: Path, *, n_ctx: int, n_seq: int = 1, n_batch: int = 2048, role: str = "candidate"
    ) -> AbstractContextManager[HfRunner]:
        """See `RunnerFactory.open`."""
        kind = FolderSubject(path, self.load_in).rounded_in(role)
        model = self._loaded.get((path, kind))
        if model is None:
            dtype = torch.float32 if self.device.type == "cpu" else None
            model = self._loaded[path, kind] = load_exactly(path, dtype=dtype, device=self.device, kind=kind)
        ends = end_tokens(model, load_tokenizer(path))
        return HfRunner(
            model, ends=ends, pad=min(ends, default=0), n_ctx=n_ctx, n_seq=sequences(n_ctx, n_seq), n_batch=n_batch
        )

    def describe(self) -> dict[str, Any]:
        """See `RunnerFactory.describe`."""
        precision = "float32" if self.device.type == "cpu" else "the folder's own"
        return {"runs_in": "transformers", "threads": self.threads, "device": self.device.type, "precision": precision,
                "load_in": self.load_in}  # fmt: skip


@dataclass(frozen=True)
class FolderEngine:
    """transformers; an `Engine`.

    Attributes:
        factory: how it loads folders.
        at_once: see `Engine.at_once`; one, because torch runs in this process.
    """

    factory: FolderFactory
    at_once: int = 1
    packages: tuple[str, ...] = ("torch", "transformers", "bitsandbytes")
    limits: tuple[str, ...] = (
        "It was measured with these versions of torch and bitsandbytes on this machine; other kernels, those of a GPU above all, "
        "round differently.",
    )

    def open(self, path: Path) -> FolderSubject:
        """See `Engine.open`."""
        return FolderSubject(path, self.factory.load_in)

    def identity(self, role: str, facts: FileFacts) -> str:
        """See `Engine.identity`."""
        return f"{facts.sha256}:{facts.file_type}"

    def check_pair(self, base: Subject, other: Subject) -> list[str]:
        """See `Engine.check_pair`."""
        assert isinstance(base, FolderSubject)
        assert isinstance(other, FolderSubject)
        names = f"{other.path.name} and the base {base.path.name}"
        if base.architecture != other.architecture:
            raise PairError(f"{names} are different models ({other.architecture}, {base.architecture})")
        a, b = load_tokenizer(base.path), load_tokenizer(other.path)
        if a.fingerprint != b.fingerprint:
            raise PairError(f"{names} have different tokenizers; verify needs the same token ids for both")
        if a.template != b.template:
            return [f"{names} carry different chat templates; the base's was used for both"]
        return []

    def system(self) -> str:
        """See `Engine.system`."""
        if self.factory.device.type == "cuda":
            return f"torch on {torch.cuda.get_device_name(self.factory.device)}"
        return f"torch on CPU, kernels for {torch.backends.cpu.get_cpu_capability()}"

    def running(self) -> AbstractContextManager[object]:
        """See `Engine.running`."""
        return torch_threads(self.factory.threads)

    def tensor_changes(self, subjects: Mapping[str, Subject], threads: int) -> tuple[TensorChange, ...]:
        """See `Engine.tensor_changes`; what changed per tensor stands in the report of `convert`."""
        return ()
