"""What the lab compares the defenses with that is none: llama.cpp's own better rounding.

`imatrix` is llama.cpp's rounding with an importance matrix, measured on the calibration text that ships with the package, as
much of it as `feedback` sees by default. It makes errors small where the inputs are large; nothing in it aims at a payload.

The other baseline of the literature, noise as wide as the boxes (sigma: the median half-width of the rounding intervals), is the
defense `noise` with `relative=1`.
"""

from dataclasses import dataclass
from pathlib import Path

from qguard_edge.defenses.options import DefenseOptions, parse_defense
from qguard_edge.learned.calibration_mix import MixRecord, mix_records
from qguard_edge.runtimes.imatrix import make_imatrix

CHUNK, CHUNKS = 512, 48  # 24,576 tokens, as `feedback`


@dataclass(frozen=True)
class ImatrixOptions(DefenseOptions):
    """Plain rounding by an importance matrix."""

    name = "imatrix"
    summary = "llama.cpp's own rounding with an importance matrix of the shipped text: a baseline, no defense"
    implementation = "qguard_edge.defenses.none:NoDefense"


def parse_arm(text: str) -> DefenseOptions:
    """A defense with its options, or a baseline of the lab.

    Raises:
        UnsupportedError: an unknown name or option.
    """
    return ImatrixOptions() if text.strip() == ImatrixOptions.name else parse_defense(text)


def imatrix_of(base: Path) -> Path:
    """The importance matrix of a full-precision GGUF, kept beside it."""
    made = base.with_suffix(".imatrix.gguf")
    if not made.is_file():
        text = base.with_suffix(".imatrix.txt")
        text.write_text("\n\n".join(_plain(record) for record in mix_records()), encoding="utf-8")
        make_imatrix(str(base), text, made, chunk_size=CHUNK, max_chunks=CHUNKS)
    return made


def _plain(record: MixRecord) -> str:
    """A text, or what was said in a conversation, one turn after the other."""
    return record.text or "\n".join(content for _, content in record.messages)
