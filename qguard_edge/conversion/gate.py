"""The verification that a conversion ends with, if it is asked for."""

from qguard_edge.conversion.request import ConversionRequest, FolderRequest, GgufRequest
from qguard_edge.progress import Progress
from qguard_edge.verify.choose import SuiteChoice, choose_suites
from qguard_edge.verify.gate import Gate, make_gate
from quant_grids.errors import UnsupportedError


def gate_for(request: ConversionRequest, suites: SuiteChoice, progress: Progress, *, limit: int | None = None) -> Gate:
    """What verifies the output of a conversion; checked before the conversion begins.

    Args:
        request: of the conversion.
        suites: to ask.
        progress: told about each stage.
        limit: prompts per suite, and texts, at most; None: all.

    Raises:
        UnsupportedError: an output that cannot be verified as it is.
        SuiteError: an unknown suite.
    """
    load_in = None
    if isinstance(request, FolderRequest):
        if len(request.kinds) > 1:
            raise UnsupportedError(
                f"--verify asks about one format, --target all makes a folder for {len(request.kinds)}; verify the finished "
                "folder with `qguard-edge verify --load-in nf4` and so on"
            )
        load_in = request.kinds[0]
    elif not isinstance(request, GgufRequest):
        raise UnsupportedError("--verify needs a quantized output; quantize this one with llama.cpp and verify the result")
    elif request.options.file_type.base:
        raise UnsupportedError(
            f"--verify compares a quantized file with its base; --to {request.options.file_type.name} quantizes nothing"
        )
    return make_gate(
        choose_suites(suites), request.threads, 0, progress, device=request.device, load_in=load_in, limit=limit
    )
