"""From plain values to the request that a conversion takes: one way for scripts and for the command line."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from convert.folder_targets import is_folder_target
from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, parse_tensor_type
from qguard_edge.conversion.request import ConversionRequest, FolderRequest, GgufRequest, MovedGgufRequest
from qguard_edge.defenses.options import DEFAULT_DEFENSE, DefenseOptions, parse_defense
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.memory import parse_size
from quant_grids.errors import UnsupportedError

Request = TypeVar("Request", bound=ConversionRequest)

FolderName = Literal["nf4", "fp4", "int8", "hf"]
GgufName = Literal[
    "q1_0", "q2_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4_moe", "tq1_0", "tq2_0",
    "q2_k", "q2_k_s", "q3_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k", "q4_k_s", "q4_k_m", "q5_k", "q5_k_s", "q5_k_m", "q6_k",
    "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs",
    "f16", "bf16", "f32",
]  # fmt: skip
"""llama.cpp's file types, for type checkers; any other spelling that the command line takes works too."""

_QUANTIZE = tuple(item.name for item in fields(QuantizeOptions) if item.name != "file_type")


@overload
def request_for(
    model: str | Path, to: FolderName, *, target: str | None = None, defense: str | DefenseOptions = ..., **values: Any
) -> FolderRequest: ...
@overload
def request_for(
    model: str | Path, to: Literal["gguf"], *, target: str, defense: str | DefenseOptions = ..., **values: Any
) -> MovedGgufRequest: ...
@overload
def request_for(model: str | Path, to: GgufName, *, defense: str | DefenseOptions = ..., **values: Any) -> GgufRequest: ...
@overload
def request_for(
    model: str | Path, to: str, *, target: str | None = None, defense: str | DefenseOptions = ..., **values: Any
) -> GgufRequest | MovedGgufRequest | FolderRequest: ...
def request_for(
    model: str | Path,
    to: str,
    *,
    target: str | None = None,
    defense: str | DefenseOptions = DEFAULT_DEFENSE,
    **values: Any,
) -> GgufRequest | MovedGgufRequest | FolderRequest:
    """The request for one kind of output.

    Args:
        model: folder, hub id or .gguf file.
        to: as `convert --to`: a llama.cpp file type in any case, or nf4, fp4, int8, hf, gguf.
        target: for `hf`: nf4, fp4, int8 or all; for `gguf`: the llama.cpp type that the file is made for.
        defense: a name, a name with options (`ortho:width=1`), or the options themselves.
        values: fields of the request by name, and for GGUF files those of `QuantizeOptions`. None stands for the
            default. Beside the fields' own types: paths as text, `max_memory="24GiB"`, `calibration="chats.jsonl"`,
            `tensor_types=["ffn_down=q6_k"]`.

    Raises:
        UnsupportedError: an unknown type or defense, or a field that this kind of output does not have.
        MemoryLimitError: `max_memory` is no size.
    """
    chosen = parse_defense(defense) if isinstance(defense, str) else defense
    given = {name: _READ[name](value) if name in _READ else value for name, value in values.items() if value is not None}
    given |= {"model": str(model), "defense": chosen}
    kind = to.strip().lower()
    if is_folder_target(kind):
        return _made(FolderRequest, given | {"to": kind, "target": target}, to)
    if kind != "gguf":
        if target is not None:
            raise UnsupportedError(f"--target does not go with --to {to}")
        return _made(GgufRequest, _with_quantize_options(given, to), to)
    if target is None:
        raise UnsupportedError("--to gguf needs --target TYPE: the llama.cpp type that the base is to be quantized to")
    return _made(MovedGgufRequest, _with_quantize_options(given, target), to)


def _with_quantize_options(given: Mapping[str, Any], file_type: str) -> dict[str, Any]:
    """The values with those of `QuantizeOptions` gathered in one."""
    options = QuantizeOptions(parse_file_type(file_type), **{name: given[name] for name in _QUANTIZE if name in given})
    return {name: value for name, value in given.items() if name not in _QUANTIZE} | {"options": options}


def _made(kind: type[Request], given: Mapping[str, Any], to: str) -> Request:
    known = {item.name for item in fields(kind)}
    for name in given:
        if name not in known:
            listed = ", ".join(sorted(known - {"options"} | (set(_QUANTIZE) if "options" in known else set())))
            raise UnsupportedError(f"{name} does not go with --to {to}, which takes: {listed}")
    return kind(**given)


def _calibration(value: CalibrationOptions | str | Path) -> CalibrationOptions:
    return value if isinstance(value, CalibrationOptions) else CalibrationOptions(Path(value))


def _tensor_types(value: Iterable[str | tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(parse_tensor_type(item) if isinstance(item, str) else item for item in value)


_READ: Mapping[str, Callable[[Any], Any]] = {
    "calibration": _calibration,
    "converter": Path,
    "imatrix": Path,
    "max_memory": lambda value: parse_size(str(value)),
    "override_kv": tuple,
    "skip": tuple,
    "tensor_types": _tensor_types,
}
"""How values of other types become a field's own."""
