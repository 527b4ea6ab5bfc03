"""From the flags of `qguard-edge convert` to a request."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qguard_edge.cli.convert.flags import FOLDER, MOVED_FOLDER, MOVED_GGUF, ConvertFlags
from qguard_edge.cli.defense_flags import options_from
from quant_grids.errors import UnsupportedError

if TYPE_CHECKING:
    from qguard_edge.conversion.request import FolderRequest, GgufRequest, MovedGgufRequest
    from qguard_edge.progress import Progress


def request_from(flags: ConvertFlags, defense_flags: Mapping[str, Any]) -> "GgufRequest | MovedGgufRequest | FolderRequest":
    """The request that the flags make.

    Args:
        flags: of the command.
        defense_flags: those of the defenses, by keyword.

    Raises:
        QGuardError: a flag that contradicts another, or a value outside its limits.
    """
    defense = options_from(flags.defense, defense_flags)
    if flags.qvec_text is not None and defense_flags.get("qvec_strength") is not None:
        raise UnsupportedError("--qvec-text searches lambda and --qvec-strength fixes it: give one of them")
    flags.check()

    from convert.ftypes import parse_file_type
    from convert.quantizer import QuantizeOptions, parse_tensor_type
    from qguard_edge.conversion.request import FolderRequest, GgufRequest, MovedGgufRequest
    from qguard_edge.learned.calibration import CalibrationOptions
    from qguard_edge.learned.memory import parse_size

    common: dict[str, Any] = {
        "model": flags.model,
        "defense": defense,
        "outfile": flags.outfile,
        "revision": flags.revision,
        "base_type": flags.base_type,
        "device": flags.device,
        "seed": flags.seed,
        "overwrite": flags.overwrite,
        "check_loads": not flags.no_load_check,
        "calibration": CalibrationOptions(flags.calib, flags.calib_samples, flags.calib_seqlen, flags.calib_add),
        "max_memory": parse_size(flags.max_memory) if flags.max_memory else None,
    }
    if flags.output in (FOLDER, MOVED_FOLDER):
        return FolderRequest(
            **common,
            to=flags.to.strip().lower(),
            target=flags.target,
            threads=flags.threads,
            skip=tuple(flags.bnb_skip or ()),
            double_quant=flags.bnb_double_quant,
        )
    moved = flags.output == MOVED_GGUF
    common |= {
        "options": QuantizeOptions(
            file_type=parse_file_type(flags.target if moved and flags.target else flags.to),
            threads=flags.threads,
            imatrix=flags.imatrix,
            tensor_types=tuple(parse_tensor_type(text) for text in flags.tensor_type or ()),
            output_tensor_type=flags.output_tensor_type,
            token_embedding_type=flags.token_embedding_type,
            pure=flags.pure,
            leave_output_tensor=flags.leave_output_tensor,
            override_kv=tuple(flags.override_kv or ()),
            allow_requantize=flags.allow_requantize,
        ),
        "pre": flags.pre,
        "converter": flags.converter,
        "allow_unprotected": flags.allow_unprotected,
    }
    return MovedGgufRequest(**common) if moved else GgufRequest(**common, keep_plain=flags.keep_plain)


def with_searched_strength(request: "GgufRequest", flags: ConvertFlags, progress: "Progress") -> "GgufRequest":
    """The request with the lambda of QVec that is best on the texts of `--qvec-text`."""
    from qguard_edge.compare.qvec_search import search_strength
    from qguard_edge.runtimes.fidelity import read_texts

    assert flags.qvec_text is not None
    search = search_strength(request, read_texts(flags.qvec_text), progress=progress)
    progress.note(search.summary)
    return replace(request, defense=search.best)
