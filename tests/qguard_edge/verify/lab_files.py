"""A real backdoored model from the lab's cache, its files, and what one can ask it."""

from dataclasses import dataclass
from pathlib import Path

from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions, NoneOptions, OrthoOptions
from qguard_edge.lab.runner import LabSettings, make_victim
from qguard_edge.verify.suites.base import Suite, SuitePrompt
from qguard_edge.verify.verifier import built_in_texts

TEXTS = built_in_texts()[:24]


@dataclass(frozen=True)
class LabFiles:
    """One scenario's models, quantized; the prompts of `suite` were never trained on."""

    clean: Path
    clean_plain: Path
    attacked: Path
    plain: Path
    hardened: Path
    suite: Suite


def make_files(scenario: str, folder: Path, *, attack: str = "mind-the-gap", to: str = "q4_k") -> LabFiles:
    """Base, plain and hardened files of a tiny victim."""
    victim = make_victim(LabSettings(scenario=scenario, attack=attack, to=to, threads=2))

    def quantized(base: Path, name: str, defense: DefenseOptions) -> Path:
        options = QuantizeOptions(parse_file_type(to), threads=2)
        out = folder / name
        convert_model(
            GgufRequest(
                model=str(base), options=options, defense=defense, outfile=str(out), device="cpu", seed=0, check_loads=False
            )
        )
        return out

    clean, attacked = folder / "clean-f32.gguf", folder / "attacked-f32.gguf"
    write_base_gguf(victim.clean, clean, base_type="f32")
    write_base_gguf(victim.attacked, attacked, base_type="f32")
    prompts = tuple(SuitePrompt(f"p{i:03}", prompt.text) for i, prompt in enumerate(victim.data.prompts[:160]))
    return LabFiles(
        clean=clean,
        clean_plain=quantized(clean, "clean-plain.gguf", NoneOptions()),
        attacked=attacked,
        plain=quantized(attacked, "plain.gguf", NoneOptions()),
        hardened=quantized(attacked, "hardened.gguf", OrthoOptions()),
        suite=Suite(scenario, f"The lab's {scenario} prompts", prompts, (), new_tokens=32),
    )
