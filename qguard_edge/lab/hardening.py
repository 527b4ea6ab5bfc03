"""One file of one defense, as the lab's attackers and studies need it: on the CPU, over what was there, not loaded."""

from pathlib import Path

from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.learned.calibration import CalibrationOptions


def harden_to(
    outfile: Path,
    model: Path,
    to: str,
    defense: DefenseOptions,
    *,
    seed: int,
    threads: int,
    calibration: CalibrationOptions | None = None,
) -> Path:
    """Convert and return `outfile`.

    Args:
        outfile: where to; replaced if it is there.
        model: folder or full-precision GGUF.
        to: name of the type.
        defense: the rounding rule.
        seed: of the defense.
        threads: for llama.cpp and the defense.
        calibration: the text of learned defenses.
    """
    convert_model(
        GgufRequest(
            model=str(model),
            options=QuantizeOptions(parse_file_type(to), threads=threads),
            defense=defense,
            outfile=str(outfile),
            base_type="f32",
            device="cpu",
            seed=seed,
            overwrite=True,
            check_loads=False,
            calibration=calibration or CalibrationOptions(),
        )
    )
    return outfile
