"""From the flags of `qguard-edge convert` to a request."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qguard_edge.cli.convert.flags import GGUF, ConvertFlags
from qguard_edge.cli.defense_flags import options_from
from qguard_edge.cli.split_flags import split_rule
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

    from qguard_edge.conversion.request_for import request_for
    from qguard_edge.learned.calibration import CalibrationOptions

    values = {
        "outfile": flags.outfile,
        "revision": flags.revision,
        "base_type": flags.base_type,
        "device": flags.device,
        "seed": flags.seed,
        "overwrite": flags.overwrite,
        "threads": flags.threads,
        "max_memory": flags.max_memory,
        "skip": flags.bnb_skip,
        "double_quant": flags.bnb_double_quant,
        "imatrix": flags.imatrix,
        "tensor_types": flags.tensor_type,
        "output_tensor_type": flags.output_tensor_type,
        "token_embedding_type": flags.token_embedding_type,
        "pure": flags.pure,
        "leave_output_tensor": flags.leave_output_tensor,
        "override_kv": flags.override_kv,
        "allow_requantize": flags.allow_requantize,
        "allow_unprotected": flags.allow_unprotected,
        "pre": flags.pre,
        "converter": flags.converter,
        "trust_remote_code": flags.trust_remote_code,
        "no_fallback": flags.no_fallback,
        "split": split_rule(flags.split_max_size, flags.split_max_tensors, flags.keep_split),
        "mmproj": flags.mmproj.lower() if flags.mmproj else None,
        "keep_plain": flags.keep_plain,
        "fidelity": flags.output == GGUF and not (flags.no_fidelity or flags.no_load_check),
    }
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    return request_for(
        flags.model,
        flags.to,
        target=flags.target,
        defense=defense,
        check_loads=not flags.no_load_check,
        calibration=CalibrationOptions(flags.calib, flags.calib_samples, flags.calib_seqlen, flags.calib_add),
        **given,
    )


def with_searched_strength(request: "GgufRequest", flags: ConvertFlags, progress: "Progress") -> "GgufRequest":
    """The request with the lambda of QVec that is best on the texts of `--qvec-text`."""
    from qguard_edge.compare.qvec_search import search_strength
    from qguard_edge.runtimes.fidelity import read_texts

    assert flags.qvec_text is not None
    search = search_strength(request, read_texts(flags.qvec_text), progress=progress)
    progress.note(search.summary)
    return replace(request, defense=search.best)
