"""The `qguard.*` entries of a hardened file: enough to say what was done to it and to do it again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from qguard_edge.conversion.activations import ActivationReport
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.learned.settings import LearnReport
from qguard_edge.rounding.gguf import TensorRounding, total_outcome


def qguard_entries(
    version: str,
    defense: DefenseOptions,
    seed: int,
    hashes: Mapping[str, str],
    roundings: Sequence[TensorRounding],
    learned: LearnReport | None = None,
    activations: ActivationReport | None = None,
) -> dict[str, bool | int | float | str]:
    """Metadata entries without their prefix; the length of each value does not depend on the results.

    Args:
        version: of qguard-edge.
        defense: the rounding rule and its options.
        seed: of its random numbers, as text because readers of GGUF differ in how they take 64-bit numbers.
        hashes: SHA-256 of `base` and `plain`.
        roundings: per protected tensor.
        learned: what a learned defense reported; adds the hash of its text.
        activations: what was seen of the inputs of matrices; adds the hash of its text, and the entropy of the draws, as far as
            it can be vouched for.
    """
    total = total_outcome(roundings)
    weights = sum(rounding.n_weights for rounding in roundings)
    calibrated: dict[str, str | int | float] = {}
    if learned:
        calibrated |= {"calibration.sha256": learned.calibration_sha256, "calibration.samples": learned.samples}
    if activations:
        bits = sum(rounding.bits for rounding in roundings)
        differing = sum(rounding.differing for rounding in roundings)
        calibrated |= {
            "calibration.sha256": activations.calibration_sha256,
            "calibration.tokens": activations.tokens,
            **({"moved": learned.moved} if learned else {}),
            "entropy.bits": float(bits),
            "entropy.bits_per_weight": float(bits / weights) if weights else 0.0,
            **({} if learned else {"entropy.share_between_seeds": float(differing / weights) if weights else 0.0}),
        }
    return {
        "version": version,
        "defense": defense.name,
        "params": json.dumps(asdict(defense), sort_keys=True),
        "seed": str(seed),
        "base.sha256": hashes["base"],
        "plain.sha256": hashes["plain"],
        "share_flipped": float(total.n_changed / weights) if weights else 0.0,
        "alignment": float(total.alignment),
        **calibrated,
    }
