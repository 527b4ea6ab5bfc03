"""Move the weights of a base GGUF so that the unmodified llama-quantize rounds them to hardened codes.

The papers' own setting: nobody touches the quantizer, the full-precision file changes. Whoever publishes the base and leaves
the quantizing to others can harden it this way. The counterpart for bitsandbytes is `qguard_edge.rounding.bnb_moved`.

How
---
1. Convert as ever: llama.cpp's reference, and the codes that the defense chose.
2. A weight whose code was changed moves to the nearest point of the new code's cell (`quant_grids.cells`), a margin inside it;
   all others stay, and so do the extreme weights of each sub-block, which set its scale: their flips are given up.
3. Let llama.cpp quantize the result, and count what came out.

Step 3 is needed because only the legacy types (Q4_0 ... Q8_0) take their scales from the largest weights. There every code is
reached. The k-quants and IQ4 types search for the scales with the smallest error, and moved weights change what they find: what
remains of the chosen rounding is measured, not promised. The measure that counts is the alignment of the file that llama.cpp
makes; new scales alone turn the rounding error away from the old one.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from convert.atomic import atomic_path, check_writable
from convert.base_gguf import write_base
from convert.gguf_file import GgufFile, GgufModel
from convert.hashes import sha256_of
from convert.quantizer import quantize
from convert.source import resolve_source
from qguard_edge.conversion.naming import check_output, reference_path, work_folder
from qguard_edge.conversion.outputs.gguf import Guard, convert_model
from qguard_edge.conversion.request import ConvertRequest
from qguard_edge.defenses.options import NoiseOptions, QVecOptions
from qguard_edge.progress import Clock, NoProgress, Progress
from qguard_edge.runtimes.load_check import load_check
from quant_grids.cells import SEARCHED_TYPES
from quant_grids.errors import UnsupportedError


def convert_to_moved_base(
    request: ConvertRequest, progress: Progress | None = None, guard: Guard | None = None
) -> MovedReport:
    """Write a full-precision GGUF whose quantization by llama.cpp is hardened; on any error nothing is left.

    Args:
        request: as for `convert_model`; `options.file_type` is the type that the base is made for, `outfile` the base
            (`{ftype}` and `{FTYPE}` are replaced; default `NAME-for-FTYPE.gguf` here).
        progress: told about each stage.
        guard: asked about the model first, as by `convert_model`.

    Raises:
        UnsupportedError: a type that shares codes between weights, or none that rounds.
        QGuardError: as `convert_model`.
    """
    progress = progress or NoProgress()
    request, warnings = _check(request)
    source = resolve_source(request.model, request.revision)
    name = request.options.file_type.name
    template = request.outfile or f"{source.name}-for-{{FTYPE}}.gguf"
    outfile = Path(template.replace("{ftype}", name.lower()).replace("{FTYPE}", name)).expanduser()
    check_writable(outfile)
    check_output(outfile, source, replace(request, keep_reference=False))
    clock = Clock()
    with work_folder(outfile.parent) as work:
        base = source.path
        if not source.is_gguf:
            with clock.stage("base"):
                base = work / "base.gguf"
                warnings += write_base(source, base, request, request.base_type, progress)
        with clock.stage("choose codes"):
            made = convert_model(
                replace(request, model=str(base), outfile=str(work / "chosen.gguf"), keep_reference=True, check_loads=False),
                progress,
                guard=guard,
            )
        move = _Move(
            GgufModel(base), GgufFile(reference_path(made.outfile)), GgufFile(made.outfile), request.options.threads
        )
        with atomic_path(outfile) as moved:
            with clock.stage("move"):
                progress.stage("Moving the weights", sum(t.n_weights for t in move.tensors), "weights")
                counts = move.write(moved, progress)
            with clock.stage("quantize again"):
                progress.stage(f"Asking llama.cpp for {name}", len(move.reference.tensors), "tensors")
                again = work / "again.gguf"
                quantize(moved, again, request.options, progress=lambda _i, _n, tensor: progress.advance(1, tensor))
            with clock.stage("count"):
                progress.stage("Counting the codes", sum(t.n_weights for t in move.tensors), "weights")
                tensors = move.count(GgufFile(again), counts, progress)
            loaded = None
            if request.check_loads:
                with clock.stage("load check"):
                    loaded = load_check(moved, threads=request.options.threads)
            hashes = {"base": made.hashes["base"], "output": sha256_of([moved])}
    assert made.seed is not None
    return MovedReport(
        outfile,
        request,
        made.seed,
        tensors,
        made.roundings,
        hashes,
        dict(clock.seconds),
        (*warnings, *made.warnings, *_doubts(tensors)),
        loaded,
    )


def _check(request: ConvertRequest) -> tuple[ConvertRequest, list[str]]:
    """The request with a defense that chooses codes, and what to say about it."""
    file_type, defense = request.options.file_type, request.defense
    if file_type.base:
        raise UnsupportedError(f"--target {file_type.name}: nothing is rounded there; choose a quantized type such as q4_0")
    if isinstance(defense, NoiseOptions | QVecOptions) and defense.mode == "requantize":
        said = f"{defense.name} keeps the scales here (its fixed-grid mode): codes are to be reached on the reference's grid"
        return replace(request, defense=replace(defense, mode="fixed-grid")), [said]
    return request, []


def _doubts(tensors: Sequence[MovedTensor]) -> tuple[str, ...]:
    """Says which types llama.cpp fits scales to, so that the chosen codes are not all reached."""
    searched = sorted({tensor.ggml_type.name for tensor in tensors if tensor.ggml_type in SEARCHED_TYPES})
    if not searched:
        return ()
    moved = sum(t.n_moved for t in tensors if t.ggml_type in SEARCHED_TYPES)
    reached = sum(t.reached for t in tensors if t.ggml_type in SEARCHED_TYPES)
    return (
        f"llama.cpp searches for the scales of {', '.join(searched)} and finds others for moved weights: "
        f"{reached / moved if moved else 1.0:.0%} of the chosen flips were reached; convert to the type itself to have all",
    )
