"""What a folder says about itself: README.md for people, qguard.json for programs. No absolute path in either."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from convert.hf_folder import RECORD_NAME, write_json
from qguard_edge import __version__
from qguard_edge.defenses.options import DefenseOptions
from quant_grids import Outcome

CARD_NAME = "README.md"

KEPT_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Fields of the original's card that hold for what is made of it."""


@dataclass(frozen=True)
class CardFacts:
    """What there is to say.

    Attributes:
        name: of the model.
        repo: its hub id, if it came from there.
        source: its folder, whose card says under which license it is.
        to: nf4, fp4, int8 or hf.
        double_quant: whether scales are compressed.
        defense: the rounding rule.
        seed: of its random numbers.
        hashes: SHA-256 of `base` and of each weight file.
        outcomes: per format, what the chosen codes change and over how many weights.
        calibration_sha256: of the text that a learned defense looked at.
    """

    name: str
    repo: str | None
    source: Path
    to: str
    double_quant: bool
    defense: DefenseOptions
    seed: int
    hashes: Mapping[str, str]
    outcomes: Mapping[str, tuple[Outcome, int]]
    calibration_sha256: str | None = None


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write both files."""
    record = {
        "version": __version__,
        "to": facts.to,
        "defense": facts.defense.name,
        "params": asdict(facts.defense),
        "seed": str(facts.seed),
        "double_quant": facts.double_quant,
        "calibration_sha256": facts.calibration_sha256,
        "sha256": dict(facts.hashes),
        "formats": {
            kind: {"weights": weights, "share_flipped": outcome.n_changed / weights, "alignment": outcome.alignment}
            for kind, (outcome, weights) in facts.outcomes.items()
        },
    }
    write_json(folder / RECORD_NAME, record)
    (folder / CARD_NAME).write_text(_card(facts), encoding="utf-8")


def _card(facts: CardFacts) -> str:
    kept = front_matter(facts.source / CARD_NAME)
    tags = ["qguard-edge", "quantized", "bitsandbytes", facts.to] if facts.to != "hf" else ["qguard-edge", "bitsandbytes"]
    data = ModelCardData(
        library_name="transformers",
        tags=tags,
        base_model=facts.repo,
        base_model_relation="quantized" if facts.repo and facts.to != "hf" else None,
        **{key: kept[key] for key in KEPT_KEYS if key in kept},
    )
    title = (
        f"{facts.name}, {facts.to.upper()} for bitsandbytes" if facts.to != "hf" else f"{facts.name}, moved for bitsandbytes"
    )
    rows = [
        f"| {kind.upper()} | {weights} | {outcome.n_changed / weights:.2%} | {outcome.alignment:.3f} |"
        for kind, (outcome, weights) in facts.outcomes.items()
    ]
    hashes = [f"| {name} | `{value}` |" for name, value in facts.hashes.items()]
    return "\n".join(
        [
            "---",
            data.to_yaml(),
            "---",
            "",
            f"# {title}",
            "",
            _what_was_done(facts),
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "",
            *_usage(facts),
            "```",
            "",
            f"Made by qguard-edge {__version__} with the rounding defense `{facts.defense.label}`, seed {facts.seed}.",
            f"Options: `{json.dumps(asdict(facts.defense), sort_keys=True)}`.",
            "",
            "| format | weights | codes that differ from plain rounding | alignment with the plain rounding error |",
            "|---|---|---|---|",
            *rows,
            "",
            "Alignment 1 is plain rounding, 0 means that no component of the plain rounding error is left.",
            "",
            "| file | SHA-256 |",
            "|---|---|",
            *hashes,
            "",
            "`base` is the checkpoint that was converted. The rounding of the linear modules was chosen; a behaviour that the",
            "full-precision model has is not changed by that.",
            "",
        ]
    )


def _what_was_done(facts: CardFacts) -> str:
    if facts.to == "hf":
        codes = ", ".join(kind.upper() for kind in facts.outcomes)
        return (
            "Full-precision weights, moved within narrow bounds so that bitsandbytes' unmodified quantizer rounds them to chosen "
            f"codes ({codes}): a measure against backdoors that wait for quantization."
        )
    return (
        "A pre-quantized checkpoint. Scales are bitsandbytes' own; which way each weight was rounded was chosen anew: a measure "
        "against backdoors that wait for quantization."
    )


def _usage(facts: CardFacts) -> list[str]:
    if facts.to != "hf":
        return ['model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")']
    settings = {"nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4"', "fp4": 'load_in_4bit=True, bnb_4bit_quant_type="fp4"'}
    kind = next(iter(facts.outcomes), "nf4")
    config = settings.get(kind, "load_in_8bit=True")
    return [
        "from transformers import BitsAndBytesConfig",
        "",
        f"config = BitsAndBytesConfig({config})",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", quantization_config=config)',
    ]


def front_matter(path: Path) -> Mapping[str, Any]:
    """The YAML head of the original's card; nothing where there is none or it cannot be read."""
    if not path.is_file() or path.stat().st_size > 1 << 20:
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, YAMLError):
        return {}
