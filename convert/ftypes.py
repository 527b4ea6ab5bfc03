"""llama.cpp's file types: the names `llama-quantize` accepts, and what each writes.

A *file type* (ftype) such as Q4_K_M is a recipe for a whole file: most tensors get its main type, some get another one (the
mixture). Which tensor gets what is decided by `llama_model_quantize`, never here.

Source of names and numbers: `tools/quantize/quantize.cpp` and `enum llama_ftype` in `include/llama.h`.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from convert.folder_targets import FOLDER_TARGETS
from quant_grids.errors import UnsupportedError


@dataclass(frozen=True)
class FileType:
    """One entry of llama.cpp's list.

    Attributes:
        name: canonical name, upper case.
        number: value of `llama_ftype`.
        main: ggml type of most tensors.
        needs_imatrix: llama.cpp refuses to write it without an importance matrix.
        base: F32, F16 or BF16: nothing is quantized.
    """

    name: str
    number: int
    main: str
    needs_imatrix: bool = False
    base: bool = False


FILE_TYPES: tuple[FileType, ...] = (
    FileType("Q1_0", 40, "Q1_0"),
    FileType("Q2_0", 41, "Q2_0"),
    FileType("Q4_0", 2, "Q4_0"),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("MXFP4_MOE", 38, "MXFP4"),
    FileType("Q5_0", 8, "Q5_0"),
    FileType("Q5_1", 9, "Q5_1"),
    FileType("IQ2_XXS", 19, "IQ2_XXS", needs_imatrix=True),
    FileType("IQ2_XS", 20, "IQ2_XS", needs_imatrix=True),
    FileType("IQ2_S", 28, "IQ2_XS", needs_imatrix=True),
    FileType("IQ2_M", 29, "IQ2_S", needs_imatrix=True),
    FileType("IQ1_S", 24, "IQ1_S", needs_imatrix=True),
    FileType("IQ1_M", 31, "IQ1_M", needs_imatrix=True),
    FileType("TQ1_0", 36, "TQ1_0"),
    FileType("TQ2_0", 37, "TQ2_0"),
    FileType("Q2_K", 10, "Q2_K"),
    FileType("Q2_K_S", 21, "Q2_K", needs_imatrix=True),
    FileType("IQ3_XXS", 23, "IQ3_XXS", needs_imatrix=True),
    FileType("IQ3_XS", 22, "IQ3_S", needs_imatrix=True),
    FileType("IQ3_S", 26, "IQ3_S"),
    FileType("IQ3_M", 27, "IQ3_S"),
    FileType("Q3_K_S", 11, "Q3_K"),
    FileType("Q3_K_M", 12, "Q3_K"),
    FileType("Q3_K_L", 13, "Q3_K"),
    FileType("IQ4_NL", 25, "IQ4_NL"),
    FileType("IQ4_XS", 30, "IQ4_XS"),
    FileType("Q4_K_S", 14, "Q4_K"),
    FileType("Q4_K_M", 15, "Q4_K"),
    FileType("Q5_K_S", 16, "Q5_K"),
    FileType("Q5_K_M", 17, "Q5_K"),
    FileType("Q6_K", 18, "Q6_K"),
    FileType("Q8_0", 7, "Q8_0"),
    FileType("F16", 1, "F16", base=True),
    FileType("BF16", 32, "BF16", base=True),
    FileType("F32", 0, "F32", base=True),
)
"""Every name of llama-quantize but COPY, which quantizes nothing."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_BY_NAME = {file_type.name: file_type for file_type in FILE_TYPES}


def parse_file_type(text: str) -> FileType:
    """The file type of a name (any case, aliases included) or of an ftype number.

    Raises:
        UnsupportedError: no such type; the message lists the names.
    """
    name = text.strip().upper()
    name = ALIASES.get(name, name)
    if name in _BY_NAME:
        return _BY_NAME[name]
    for file_type in FILE_TYPES:
        if name == str(file_type.number):
            return file_type
    known = [*_BY_NAME, *ALIASES]
    if near := _nearest(name, [*known, *(kind.upper() for kind in FOLDER_TARGETS)]):
        raise UnsupportedError(
            f"{text!r} is not a file type; did you mean {' or '.join(near)}? `qguard-edge types` lists all of them"
        )
    raise UnsupportedError(
        f"{text!r} is not a file type that llama.cpp writes; choose one of {', '.join(known)}, or for bitsandbytes one of "
        f"{', '.join(FOLDER_TARGETS)}"
    )


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Known names that somebody who wrote `name` may have meant, the likeliest first, three at most."""

    def bare(text: str) -> str:
        return text.replace("_", "").replace("-", "")

    same = [one for one in known if bare(one) == bare(name)]
    longer = [one for one in known if bare(one).startswith(bare(name))] if len(name) > 1 else []
    usual = [full for short, full in ALIASES.items() if name.startswith(short)]
    return (same or [*dict.fromkeys([*usual, *longer, *difflib.get_close_matches(name, known, n=3, cutoff=0.7)])])[:3]
