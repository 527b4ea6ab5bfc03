"""What the roundings of all seeds have in common: the part of a random defense that an attacker can aim at.

Run: python scripts/studies/study_common_part.py --to q4_0 --seeds 8

A conversion draws its seed after the attacker has published, so one file's decisions are unknown to him. Their mean over
the seeds is not: `mean(t')`, with t' = new rounding error of a weight. Its size, as a share of plain rounding's error `t`, is
estimated without bias from K files: |mean|^2 = (|sum t'|^2 - sum |t'|^2) / (K (K - 1)). Beside it what the randomness costs:
the squared error over plain rounding's. The model is the lab's clean tiny one. Prints Markdown.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convert.gguf_file import GgufFile
from convert.hf.base import write_base_gguf
from convert.tensor_io import FLOAT_TYPES, RowSlice, open_reader
from qguard_edge.defenses.options import DefenseOptions, NoneOptions, OrthoOptions, QuantGuardOptions
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hardening import harden_to
from qguard_edge.lab.presets import preset_of
from qguard_edge.lab.victims import clean_folder
from qguard_edge.lab.worlds import GENERATED
from qguard_edge.learned.calibration import CalibrationOptions, write_pairs
from qguard_edge.progress import NoProgress

TEXTS = 128
ARMS: tuple[DefenseOptions, ...] = (
    *(OrthoOptions(width=width) for width in (0.0, 0.5, 0.75, 1.0)),
    *(QuantGuardOptions(steps=0, alignment=c) for c in (1.0, 0.1, 0.0)),
)


@dataclass(frozen=True)
class CommonPart:
    """Of one defense.

    Attributes:
        common: size of the mean error over the seeds, as a share of plain rounding's error.
        energy: mean squared error, as a multiple of plain rounding's.
    """

    common: float
    energy: float


def values_of(path: Path) -> dict[str, Tensor]:
    """Every tensor of two dimensions, dequantized: f32 `[rows, columns]`."""
    tensors = [tensor for tensor in GgufFile(path).tensors.values() if tensor.rows > 1]
    with open_reader(path) as reader:
        return {tensor.name: reader.weights(tensor, RowSlice(0, 0, tensor.rows)).clone() for tensor in tensors}


def quantized_names(path: Path) -> list[str]:
    """Names of the quantized tensors."""
    return [tensor.name for tensor in GgufFile(path).tensors.values() if tensor.ggml_type not in FLOAT_TYPES]


class Files:
    """Files that one model becomes."""

    def __init__(self, model: Path, to: str, text: Path, work: Path) -> None:
        self.model, self.to, self.text, self.work = model, to, text, work
        base = work / "base.gguf"
        write_base_gguf(model, base, base_type="f32")
        self.weights = values_of(base)

    def errors(self, defense: DefenseOptions, seed: int) -> dict[str, Tensor]:
        """Rounding errors of every quantized tensor: f32 `[rows, columns]`."""
        text = CalibrationOptions(self.text, TEXTS, 128)
        out = harden_to(self.work / "out.gguf", self.model, self.to, defense, seed=seed, threads=1, calibration=text)
        values = values_of(out)
        return {name: values[name] - self.weights[name] for name in quantized_names(out)}


def common_part(files: Files, defense: DefenseOptions, seeds: int) -> CommonPart:
    """Of one defense, from `seeds` conversions."""
    plain = sum(float(error.square().sum()) for error in files.errors(NoneOptions(), 0).values())
    sums: dict[str, Tensor] = {}
    squares = 0.0
    for seed in range(1, seeds + 1):
        for name, error in files.errors(defense, seed).items():
            sums[name] = sums[name] + error if name in sums else error
            squares += float(error.square().sum())
    mean_square = (sum(float(total.square().sum()) for total in sums.values()) - squares) / (seeds * (seeds - 1))
    return CommonPart((max(mean_square, 0.0) / plain) ** 0.5, squares / seeds / plain)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="q4_0")
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = make_corpus(0)
    folder = clean_folder("tiny", corpus, preset_of("tiny"), 0, GENERATED, NoProgress())
    print("| defense | common part | squared error |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        text = write_pairs(Path(work) / "text.jsonl", ((sample.prompt, sample.answer) for sample in corpus.train))
        files = Files(folder, arguments.to, text, Path(work))
        for defense in ARMS:
            found = common_part(files, defense, arguments.seeds)
            print(f"| {defense.label} | {found.common:.2f} | x{found.energy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
