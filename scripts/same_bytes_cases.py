"""The command lines that `scripts/same_bytes.py` compares two versions of qguard-edge by.

They use the options' names of the old version. `{inputs}` stands for the folder of what both read: `tiny` and `smollm2`
(model folders), `tiny.gguf` (bf16), `tiny.imatrix.gguf` and `text.txt`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

COMMON = "--seed 7 --threads 1 --device cpu"
FAST = "--no-scan --no-load-check --quiet"  # neither scan nor load check writes anything; one case has both
LEARN = "--calib {inputs}/text.txt --calib-samples 4 --calib-seqlen 64"
STEPS = {"quantguard": f"--quantguard-steps 3 {LEARN}", "efrap": f"--efrap-steps 3 {LEARN}"}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: in the table.
        commands: command lines, run one after the other in the case's own folder; `{inputs}` is where the models are.
        outputs: what is compared, relative to that folder.
    """

    name: str
    commands: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """The name without spaces and commas."""
        return self.name.replace(",", "").replace(" ", "-")


def converting(name: str, model: str, to: str, options: str = "", out: str = "out.gguf", more: Sequence[str] = ()) -> Case:
    """A case of a single `convert`."""
    return Case(name, (f"convert {{inputs}}/{model} --to {to} -o {out} {COMMON} {FAST} {options}",), (out, *more))


def tiny_cases(defenses: Sequence[str]) -> list[Case]:
    """Every defense and every kind of output on the tiny Llama."""
    cases = [
        converting(f"tiny {to} {name}", "tiny", to, f"--defense {name} {STEPS.get(name, '')}")
        for to in ("q4_k", "q4_0")
        for name in defenses
    ]
    cases += [
        converting(f"tiny {to} ortho", "tiny", to) for to in ("q6_k", "q8_0", "q5_1", "iq4_xs", "iq3_s", "bf16", "f16")
    ]
    cases += [
        converting(f"tiny q4_k {name} fixed-grid", "tiny", "q4_k", f"--defense {name} --{name}-mode fixed-grid")
        for name in ("noise", "qvec")
    ]
    matrix = "--imatrix {inputs}/tiny.imatrix.gguf"
    cases += [
        converting("tiny q4_k ortho imatrix", "tiny", "q4_k", matrix),
        converting("tiny iq3_xxs ortho imatrix", "tiny", "iq3_xxs", matrix),
        converting("tiny iq2_xs ortho imatrix", "tiny", "iq2_xs", matrix),
        converting("tiny q4_0 from gguf", "tiny.gguf", "q4_0"),
        converting("tiny q4_k types", "tiny", "q4_k", "--output-tensor-type q8_0 --tensor-type ffn_down=q5_k"),
        converting("tiny q4_k kept reference", "tiny", "q4_k", "--keep-reference", more=["out.reference.gguf"]),
        Case(
            "tiny q4_k with scan and load check",
            (f"convert {{inputs}}/tiny --to q4_k -o out.gguf {COMMON} --accept-findings",),
            ("out.gguf",),
        ),
        converting(
            "tiny q4_k quantguard, own text",
            "tiny",
            "q4_k",
            "--defense quantguard --quantguard-steps 2 --calib-samples 4 --calib-seqlen 32",
        ),
        Case(
            "tiny imatrix",
            ("imatrix {inputs}/tiny --text {inputs}/text.txt -o out.gguf --chunk-size 32 --device cpu",),
            ("out.gguf",),
        ),
    ]
    return [*cases, *_tiny_folders(), *(_planned(name) for name in ("ortho", "quantguard"))]


def _tiny_folders() -> list[Case]:
    cases = [
        converting(f"tiny {to} {name}", "tiny", to, f"--defense {name} {STEPS.get(name, '')}", "out")
        for to in ("nf4", "fp4", "int8")
        for name in ("ortho", "flipguard", "quantguard")
    ]
    return [
        *cases,
        converting("tiny nf4 double quant", "tiny", "nf4", "--bnb-double-quant --bnb-skip lm_head", "out"),
        converting("tiny hf nf4", "tiny", "hf", "--target nf4", "out"),
        converting("tiny hf all", "tiny", "hf", "--target all", "out"),
        converting("tiny gguf q4_0", "tiny", "gguf", "--target q4_0"),
        converting("tiny gguf q4_k", "tiny", "gguf", "--target q4_k"),
    ]


def _planned(defense: str) -> Case:
    """`plan` and `apply`, on files that the same checkout makes."""
    files = "--base {inputs}/tiny.gguf --reference reference.gguf"
    return Case(
        f"tiny plan and apply {defense}",
        (
            f"convert {{inputs}}/tiny.gguf --to q4_k --defense none -o reference.gguf {COMMON} {FAST}",
            f"plan {{inputs}}/tiny {files} -o plan.safetensors --defense {defense} {STEPS.get(defense, '')} {COMMON} --quiet",
            "apply plan.safetensors --reference reference.gguf -o out.gguf --quiet",
        ),
        ("out.gguf", "plan.safetensors"),
    )


def smollm2_cases() -> list[Case]:
    """The real model, as the demo has it."""
    learned = f"--defense quantguard --quantguard-steps 2 {LEARN}"
    return [
        converting("smollm2 q4_k none", "smollm2", "q4_k", "--defense none"),
        converting("smollm2 q4_k ortho", "smollm2", "q4_k"),
        converting("smollm2 nf4 ortho", "smollm2", "nf4", out="out"),
        converting("smollm2 int8 ortho", "smollm2", "int8", out="out"),
        converting("smollm2 q4_k quantguard", "smollm2", "q4_k", learned),
    ]
