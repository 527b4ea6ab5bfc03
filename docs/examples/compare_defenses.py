"""What does each defense cost on your own model and your own texts? A table, and the same as CSV.

    python compare_defenses.py MODEL TEXTS.txt [RESULT.csv]

TEXTS.txt holds UTF-8 texts like those the model will meet, separated by empty lines. What is measured is fidelity: the
distance of the next-token distributions from full precision. Whether a defense stops a backdoor is another question.
"""

import csv
import sys
from pathlib import Path

from qguard_edge import compare, read_texts, request_for

DEFENSES = ("none", "ortho", "ortho:width=1", "flipguard")
COLUMNS = ("defense", "share flipped", "alignment", "mean KL", "low", "high", "same top token")


def main(model: str, texts: Path, result: Path | None) -> None:
    """Convert the model with each defense, measure, show."""
    rows = compare(request_for(model, "q4_k"), DEFENSES, texts=read_texts(texts), max_tokens=128)
    table = []
    for row in rows:
        fidelity = row.fidelity
        low, high = fidelity.mean_kl_interval
        table.append((row.defense.label, row.share_flipped, row.alignment, fidelity.mean_kl, low, high, fidelity.same_top))
    print(f"{COLUMNS[0]:20}" + "".join(f"{name:>16}" for name in COLUMNS[1:]))
    for name, *numbers in table:
        print(f"{name:20}" + "".join(f"{number:16.4f}" for number in numbers))
    if result:
        with result.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *table])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
