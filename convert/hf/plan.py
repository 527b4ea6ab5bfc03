"""Deciding what a base GGUF will contain, and checking that it can be made, before a byte is written.

A plan pairs every GGUF tensor with the checkpoint tensors it is made of. Making it proves: each tensor the
configuration calls for is there, in the shape the configuration says; nothing in the checkpoint is left over;
every name has its place in llama.cpp's naming; the tokenizer can be expressed. After that only reading can
fail.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf

from convert.hf.checkpoint import PLAIN_DTYPES, Checkpoint
from convert.hf.families import Family, Part, Setting, family_for
from convert.hf.jsonfile import Section, read_json
from convert.hf.quantized import open_weights
from convert.hf.tokenizer import Tokenizer, read_tokenizer
from convert.hf.transforms import Shape
from quant_grids.errors import FormatError, UnsupportedError

BASE_TYPES = ("f32", "f16", "bf16")
_GGML_TYPE = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPE = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
}
# llama.cpp reads these as float32 whatever their shape: the router of a mixture of experts, and learned
# positions.
_ALWAYS_F32 = (gguf.MODEL_TENSOR.FFN_GATE_INP, gguf.MODEL_TENSOR.POS_EMBD)


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the GGUF.

    Attributes:
        name: Its GGUF name.
        shape: Its shape, outermost dimension first (numpy's order; GGUF stores the reverse).
        type: How its elements are stored: F32, F16 or BF16.
        part: What it is made of.
        sources: The checkpoint's own names of `part.sources`.
    """

    name: str
    shape: Shape
    type: gguf.GGMLQuantizationType
    part: Part
    sources: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.elements * (4 if self.type == gguf.GGMLQuantizationType.F32 else 2)


@dataclass(frozen=True)
class BasePlan:
    """Everything the writer needs.

    Attributes:
        folder: The model folder.
        config: config.json.
        family: The family, holding the configuration.
        checkpoint: The weights.
        tensors: The GGUF's tensors in file order.
        settings: The architecture's metadata.
        tokenizer: The tokenizer.
        base_type: `f32`, `f16` or `bf16`: the type most matrices are stored in.
        warnings: What the reader of the report should know.
    """

    folder: Path
    config: Section
    family: Family
    checkpoint: Checkpoint
    tensors: tuple[BaseTensor, ...]
    settings: tuple[Setting, ...]
    tokenizer: Tokenizer
    base_type: str
    warnings: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(gguf.MODEL_ARCH_NAMES[self.family.target])

    @property
    def file_type(self) -> gguf.LlamaFileType:
        """`general.file_type`."""
        return _FILE_TYPE[self.base_type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def make_plan(folder: Path, *, base_type: str | None = None, pre: str | None = None) -> BasePlan:
    """Plans the conversion of a model folder.

    Args:
        folder: The model folder.
        base_type: `f32`, `f16`, `bf16`, or None to keep each tensor's own type.
        pre: A pre-tokenizer name to use instead of recognising one.

    Raises:
        FormatError: The folder is incomplete, malformed or contradicts itself.
        UnsupportedError: A valid model this converter cannot handle; the message names the ways out.
    """
    if base_type is not None and base_type not in BASE_TYPES:
        raise UnsupportedError(f"The base type must be one of {', '.join(BASE_TYPES)}, not {base_type!r:.40}.")
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder.")
    config = Section(read_json(folder / "config.json"), "config.json")
    family = family_for(config)(config)
    checkpoint, warnings = open_weights(folder, config)
    tensors = _plan_tensors(family, checkpoint, base_type)
    settings = tuple(family.settings())
    tokenizer = read_tokenizer(folder, config, family.geometry.vocabulary, pre=pre)
    return BasePlan(
        folder=folder,
        config=config,
        family=family,
        checkpoint=checkpoint,
        tensors=tensors,
        settings=settings,
        tokenizer=tokenizer,
        base_type=_main_type(tensors),
        warnings=(*warnings, *family.warnings, *tokenizer.warnings),
    )


def _plan_tensors(family: Family, checkpoint: Checkpoint, base_type: str | None) -> tuple[BaseTensor, ...]:
    """Matches the family's parts with the checkpoint."""
    actual = family.canonical_names(checkpoint.tensors.keys())
    parts = [part for part in family.parts() if _present(part, actual)]
    used: set[str] = set()
    for part in parts:
        for name in part.sources:
            _check_source(checkpoint, actual[name], part.shape)
            used.add(name)
    left = sorted(name for name in actual if name not in used and not _is_ignored(family, name))
    if left:
        raise UnsupportedError(
            f"The checkpoint has {len(left)} tensors that its configuration does not call for, "
            f"such as {', '.join(left[:3])}; it is not a plain {type(family).__name__} model."
        )
    # Only now that each layer's tensors are known to exist: the map has an entry per layer and alias.
    names = gguf.get_tensor_name_map(family.target, family.geometry.layers)
    return tuple(_planned(part, names, actual, checkpoint, base_type) for part in parts)


def _present(part: Part, actual: Mapping[str, str]) -> bool:
    """Whether the part's sources are in the checkpoint; raises FormatError when a required one is missing."""
    missing = [name for name in part.sources if name not in actual]
    if missing and not (part.optional and len(missing) == len(part.sources)):
        raise FormatError(f"The checkpoint has no tensor {missing[0]}, which its config.json calls for.")
    return not missing


def _check_source(checkpoint: Checkpoint, name: str, shape: Shape) -> None:
    """Raises unless a source has the configured shape and a dtype a base GGUF can hold."""
    source = checkpoint.tensors[name]
    if source.shape != shape:
        raise FormatError(f"Tensor {name} has the shape {list(source.shape)}, but config.json calls for {list(shape)}.")
    if source.dtype not in PLAIN_DTYPES:
        raise UnsupportedError(
            f"Tensor {name} is stored as {source.dtype}; only F32, F16 and BF16 weights can be converted. "
            "If the checkpoint is already quantized, convert the original one."
        )


def _is_ignored(family: Family, name: str) -> bool:
    return name.endswith(family.ignored) or (family.tied and name in ("lm_head.weight", "lm_head.bias"))


def _planned(
    part: Part, names: gguf.TensorNameMap, actual: Mapping[str, str], checkpoint: Checkpoint, base_type: str | None
) -> BaseTensor:
    """Gives a part its GGUF name, shape and type."""
    if part.data is not None:
        return BaseTensor(part.name, tuple(part.data.shape), gguf.GGMLQuantizationType.F32, part, ())
    found = names.get_type_and_name(part.mapped_name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UnsupportedError(f"llama.cpp has no name for the tensor {part.mapped_name}.")
    kind, name = found
    sources = tuple(actual[source] for source in part.sources)
    shape = part.transform.shape([part.shape] * len(sources))
    own = _GGML_TYPE[base_type.upper() if base_type else _widest(checkpoint.tensors[s].dtype for s in sources)]
    plain = len(shape) == 1 or kind in _ALWAYS_F32 or name.endswith("_norm.weight")
    return BaseTensor(name, shape, gguf.GGMLQuantizationType.F32 if plain else own, part, sources)


def _widest(dtypes: Iterable[str]) -> str:
    """The type that holds all of these exactly: their own if they agree, else F32."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else "F32"


def _main_type(tensors: Iterable[BaseTensor]) -> str:
    """The type of most elements of the matrices."""
    elements: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            elements[tensor.type.name.lower()] += tensor.elements
    return elements.most_common(1)[0][0] if elements else "f32"
