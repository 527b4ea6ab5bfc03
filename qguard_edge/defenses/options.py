"""The defenses' names, options and one-line meanings, importable without torch: the command line is built from this list.

Each defense has one frozen dataclass of options. Its fields become `--NAME-FIELD` options of `convert`, with the help text
that stands in the field's metadata.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from quant_grids.errors import UnsupportedError


def option(default: Any, help_text: str, **limits: Any) -> Any:
    """A dataclass field with the help text and limits (`minimum`, `maximum`, `choices`) that the command line shows."""
    return field(default=default, metadata={"help": help_text, **limits})


@dataclass(frozen=True)
class DefenseOptions:
    """Root of the option classes; `check` holds every field to its limits."""

    name: ClassVar[str]
    summary: ClassVar[str]
    implementation: ClassVar[str]  # "module:Class"

    def check(self) -> None:
        """Refuse values outside their limits.

        Raises:
            UnsupportedError: naming the option, the value and the limit.
        """
        for item in fields(self):
            value = getattr(self, item.name)
            flag = f"--{self.name}-{item.name.replace('_', '-')}"
            choices = item.metadata.get("choices")
            if choices and value not in choices:
                raise UnsupportedError(f"{flag} {value!r}: choose one of {', '.join(map(str, choices))}")
            low, high = item.metadata.get("minimum"), item.metadata.get("maximum")
            if isinstance(value, int | float) and not isinstance(value, bool):
                if value != value or (low is not None and value < low) or (high is not None and value > high):
                    raise UnsupportedError(f"{flag} {value}: must lie between {low} and {high}")


@dataclass(frozen=True)
class NoneOptions(DefenseOptions):
    """llama.cpp's own rounding has no options."""

    name = "none"
    summary = "llama.cpp's own rounding, unchanged: the baseline"
    implementation = "qguard_edge.defenses.none:NoDefense"


@dataclass(frozen=True)
class OrthoOptions(DefenseOptions):
    """Orthogonal rounding, see `qguard_edge.defenses.ortho`."""

    name = "ortho"
    summary = "orthogonal rounding: no error component left along the direction the attacker relied on (data-free)"
    implementation = "qguard_edge.defenses.ortho:Ortho"

    group: str = option("row", "weights over which the projection is balanced", choices=("row", "tensor"))
    target: float = option(
        0.0, "share c of the old error direction that is left: 1 none removed, 0 orthogonal, below 0 over-corrected",
        minimum=-1.0, maximum=1.0,
    )
    width: float = option(
        0.1, "width of the soft threshold, in units of a rounding step; 0 is the predictable greedy rule",
        minimum=0.0, maximum=1.0,
    )


DEFENSE_OPTIONS: Mapping[str, type[DefenseOptions]] = {cls.name: cls for cls in (NoneOptions, OrthoOptions)}
DEFAULT_DEFENSE = "ortho"


def options_class(name: str) -> type[DefenseOptions]:
    """The option class of a defense.

    Raises:
        UnsupportedError: no defense of that name.
    """
    if name not in DEFENSE_OPTIONS:
        raise UnsupportedError(f"--defense {name!r}: choose one of {', '.join(DEFENSE_OPTIONS)}")
    return DEFENSE_OPTIONS[name]
