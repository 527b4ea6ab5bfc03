"""Variants of ortho that did not become options: parts of the model, and rounding without bias per sub-block.

Run: python scripts/studies/study_variants.py --victims mind-the-gap:q4_k,uniform:q4_0 --threads 1
    --out docs/results/sweeps/variants.json

* parts: ortho on the attention matrices only, on the FFN only, on everything but the embeddings and the output head, on
  those two only. The other tensors stay llama.cpp's.
* zero-sum: in each sub-block, flips against the sign of the summed error, largest normalised errors first, until the sum is
  zero: every sub-block keeps its mean.

Each on the attacked model (attack success with its Wilson interval, KL to its full precision) and on the clean one (KL).
Prints Markdown; the last line is one JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.hf.base import write_base_gguf
from convert.patch import GgufPatch
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.defenses.base import Defense, SliceKey, make_defense
from qguard_edge.defenses.greedy import bins_of, take_from_top
from qguard_edge.defenses.options import NoneOptions, OrthoOptions
from qguard_edge.lab.evaluation import Distributions, HeldOut, compare, examine, make_held_out
from qguard_edge.lab.hf_models import ChatModel, load_folder
from qguard_edge.lab.runner import LabSettings, Victim, make_victim
from qguard_edge.rounding.gguf import WalkOptions, coverage_of, harden, total_outcome
from quant_grids import Flips
from quant_grids.base import ScalarFlips

BINS = 64


class ZeroSum(Defense[OrthoOptions]):
    """Flips that bring the summed error of each sub-block to zero."""

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """See `Defense.choose`."""
        assert isinstance(flips, ScalarFlips)
        sub = flips.codes.numel() // len(flips.square)
        error, step = flips.error.view(-1, sub), flips.step.view(-1, sub)
        total = error.sum(1, keepdim=True)
        # A flip helps when it goes against the sign of the sum; amounts are in level units, for a sub-block has one scale.
        helps = (step * total < 0).float()
        jitter = key.jitter(error.shape, error.device)
        score = (flips.ratio.view(-1, sub) + self.options.width * jitter).clamp(0.0, 1.0 - 1e-6) * helps
        chosen = take_from_top(bins_of(score, BINS), step.abs() * helps, total.abs().view(-1), BINS)
        return (chosen * helps).view(flips.ratio.shape)


@dataclass(frozen=True)
class Variant:
    """A rule and the tensors that it is used on."""

    name: str
    make: Callable[[], Defense[Any]]
    wanted: Callable[[str], bool] = lambda _name: True


def is_end(name: str) -> bool:
    """Embeddings and output head."""
    return name in ("token_embd.weight", "output.weight")


VARIANTS = (
    Variant("none", lambda: make_defense(NoneOptions())),
    Variant("ortho", lambda: make_defense(OrthoOptions())),
    Variant("ortho, attention only", lambda: make_defense(OrthoOptions()), lambda name: ".attn_" in name),
    Variant("ortho, FFN only", lambda: make_defense(OrthoOptions()), lambda name: ".ffn_" in name),
    Variant("ortho, not embeddings and output", lambda: make_defense(OrthoOptions()), lambda name: not is_end(name)),
    Variant("ortho, embeddings and output only", lambda: make_defense(OrthoOptions()), is_end),
    Variant("ortho per block", lambda: make_defense(OrthoOptions(group="block"))),
    Variant("ortho per tensor", lambda: make_defense(OrthoOptions(group="tensor"))),
    Variant("zero-sum", lambda: ZeroSum(OrthoOptions(width=0.0))),
    Variant("zero-sum, width 0.5", lambda: ZeroSum(OrthoOptions(width=0.5))),
)


@dataclass(frozen=True)
class Point:
    """One variant on one victim."""

    victim: str
    variant: str
    asr: float
    low: float
    high: float
    n: int
    attacked_kl: float
    clean_kl: float
    flipped: float
    alignment: float


@dataclass(frozen=True)
class Model:
    """Files of one model, and its full-precision distributions."""

    base: Path
    plain: Path
    full: Distributions


class Study:
    """One victim."""

    def __init__(self, settings: LabSettings, work: Path) -> None:
        self.settings, self.work = settings, work
        self.victim: Victim = make_victim(settings)
        self.chat: ChatModel = load_folder(self.victim.clean)
        data = self.victim.data
        self.held_out: HeldOut = make_held_out(self.chat, data, settings.n_prompts, settings.n_texts, settings.new_tokens)
        self.models = {"attacked": self._model(self.victim.attacked), "clean": self._model(self.victim.clean)}

    def _model(self, folder: Path) -> Model:
        name = "clean" if folder == self.victim.clean else "attacked"
        base, plain = self.work / f"{name}.gguf", self.work / f"{name}-plain.gguf"
        write_base_gguf(folder, base, base_type="f32")
        quantize(base, plain, QuantizeOptions(parse_file_type(self.settings.to), threads=self.settings.threads))
        _, full = examine(base, self.chat, self.held_out, self.victim.data.judge, self.settings.threads)
        return Model(base, plain, full)

    def point(self, variant: Variant) -> Point:
        """Harden both models and measure them."""
        name = f"{self.settings.attack}:{self.settings.to}"
        judge, threads = self.victim.data.judge, self.settings.threads
        attacked, flipped, alignment = self._harden(self.models["attacked"], variant)
        behaviour, found = examine(attacked, self.chat, self.held_out, judge, threads)
        clean, _, _ = self._harden(self.models["clean"], variant)
        _, clean_found = examine(clean, self.chat, self.held_out, judge, threads)
        asr = behaviour.asr
        return Point(
            name,
            variant.name,
            asr.value,
            asr.low,
            asr.high,
            asr.n,
            compare(self.models["attacked"].full, found).mean_kl,
            compare(self.models["clean"].full, clean_found).mean_kl,
            flipped,
            alignment,
        )

    def _harden(self, model: Model, variant: Variant) -> tuple[Path, float, float]:
        """A file with the variant's rounding; share of codes changed and alignment over all quantized tensors."""
        base, plain = GgufModel(model.base), GgufFile(model.plain)
        every = coverage_of(base, plain).protected
        wanted: tuple[TensorInfo, ...] = tuple(tensor for tensor in every if variant.wanted(tensor.name))
        made = self.work / "made.gguf"
        made.unlink(missing_ok=True)
        patch = GgufPatch(plain, made, {})
        try:
            roundings = harden(
                base, plain, wanted, variant.make(), WalkOptions(1, self.settings.threads), sink=patch.write_rows
            )
            patch.copy_rest(tensor.name for tensor in wanted)
        finally:
            patch.close()
        weights = sum(tensor.n_weights for tensor in every)
        total = total_outcome(roundings)
        return made, total.n_changed / weights, total.alignment


def markdown(points: list[Point]) -> str:
    """One table."""
    lines = [
        f"### {points[0].victim}",
        "",
        "| variant | ASR (95%) | n | KL attacked | KL clean | flipped | alignment of what it was used on |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in points:
        rate = f"{p.asr:.2f} ({p.low:.2f}-{p.high:.2f})"
        numbers = f"{p.attacked_kl:.4f} | {p.clean_kl:.4f} | {p.flipped:.1%} | {p.alignment:.2f}"
        lines.append(f"| {p.variant} | {rate} | {p.n} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", default="mind-the-gap:q4_k,uniform:q4_0")
    parser.add_argument("--scenario", default="injection")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    points: list[Point] = []
    for victim in arguments.victims.split(","):
        attack, _, to = victim.partition(":")
        settings = LabSettings(attack=attack, to=to, scenario=arguments.scenario, threads=arguments.threads)
        with tempfile.TemporaryDirectory() as folder:
            study = Study(settings, Path(folder))
            found = [study.point(variant) for variant in VARIANTS]
        points += found
        print(markdown(found), flush=True)
    document = {"scenario": arguments.scenario, "points": [asdict(point) for point in points]}
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
