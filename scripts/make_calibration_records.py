"""Make `generated.jsonl` of the shipped calibration text: records from tables of facts and small grammars.

Run: python scripts/make_calibration_records.py

Most of the text is written by hand; this adds volume where a rule gives sensible answers: arithmetic told step by step,
conversions, dates, sorting, extraction and tables. The same records each time: a test makes them again.
"""

import json
import random
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "qguard_edge" / "data" / "calibration" / "generated.jsonl"
SEED = 20250109
Record = dict[str, Any]

NAMES = [
    "Amara",
    "Bjarne",
    "Chiara",
    "Davit",
    "Elif",
    "Farid",
    "Greta",
    "Hiro",
    "Ilse",
    "Jomo",
    "Kavya",
    "Luca",
    "Maren",
    "Nadim",
    "Oona",
    "Pavel",
    "Quinn",
    "Rosa",
    "Sanjay",
    "Tove",
]
GOODS = (
    ("notebooks", 2.40),
    ("umbrellas", 14.50),
    ("light bulbs", 3.25),
    ("mugs", 6.90),
    ("tickets", 11.00),
    ("plants", 8.75),
)
LENGTHS = (
    ("a rope", 12),
    ("a corridor", 27),
    ("a swimming lane", 25),
    ("a fence", 64),
    ("a football pitch", 105),
    ("a ladder", 5),
)
MOUNTAINS = ("Aconcagua", 6961), ("Ben Nevis", 1345), ("Fuji", 3776), ("Kilimanjaro", 5895), ("Mont Blanc", 4806)
RIVERS = (
    ("Danube", 2850),
    ("Ganges", 2525),
    ("Loire", 1006),
    ("Mekong", 4350),
    ("Rhine", 1233),
    ("Thames", 346),
    ("Volga", 3530),
)
TRADES = ["carpenter", "baker", "nurse", "cellist", "plumber", "translator", "gardener", "surveyor"]
TOWNS = ["Arles", "Bergen", "Cork", "Delft", "Essen", "Ghent", "Lund", "Porto", "Siena", "Turku"]
THINGS = ["lamp", "chair", "kettle", "bicycle", "drill", "radio", "saddle", "tent"]
REMARKS = [
    "fine",
    "as new",
    "one scratch",
    "cable missing",
    "needs oil",
    "sold",
    "reserved for the school",
    "to be checked again",
]


def chat(user: str, assistant: str) -> Record:
    """A conversation of one turn."""
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"kind": "conversation", "lang": "en", "messages": turns}


def shopping(draw: random.Random) -> Record:
    """A bill with a discount."""
    (first, price), (second, other) = draw.sample(GOODS, 2)
    a, b, name, percent = draw.randint(2, 9), draw.randint(2, 6), draw.choice(NAMES), draw.choice((5, 10, 20, 25))
    total = a * price + b * other
    off = total * percent / 100
    asked = draw.choice(
        (
            f"{name} buys {a} {first} at {price:.2f} and {b} {second} at {other:.2f}. There is a discount of {percent}%. "
            "What is the bill?",
            f"What do {a} {first} ({price:.2f} each) and {b} {second} ({other:.2f} each) cost together with {percent}% off?",
        )
    )
    steps = (
        f"1. {first.capitalize()}: {a} × {price:.2f} = {a * price:.2f}\n2. {second.capitalize()}: {b} × {other:.2f} = "
        f"{b * other:.2f}\n3. Together: {total:.2f}\n4. Discount: {percent}% of {total:.2f} = {off:.2f}"
    )
    return chat(asked, f"{steps}\n\nThe bill is {total:.2f} − {off:.2f} = **{total - off:.2f}**.")


def conversion(draw: random.Random) -> Record:
    """A length in other units."""
    thing, metres = draw.choice(LENGTHS)
    feet = metres / 0.3048
    return chat(
        draw.choice(
            (f"How long is {thing} of {metres} metres in feet?", f"{metres} m ({thing}) in feet and in yards, please.")
        ),
        f"One foot is exactly 0.3048 m, so {metres} m are {metres} ÷ 0.3048 ≈ {feet:.1f} feet, or about {feet / 3:.1f} yards.",
    )


def days(draw: random.Random) -> Record:
    """Days between two dates."""
    first = date(2025, draw.randint(1, 9), draw.randint(1, 28))
    last = first + timedelta(days=draw.randint(20, 90))
    end = (first.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(days=1)
    rest = (last - end).days
    gap = (last - first).days
    text = f"{first:%d %B %Y} was a {first:%A}. From there to the end of the month there are {(end - first).days} days, "
    if rest > 0:
        text += f"and from then on to {last:%d %B} another {rest}. "
        text += f"In total: **{gap} days**, or {gap // 7} weeks and {gap % 7} days."
    else:
        text = f"Both dates lie in the same month, so it is simply {last.day} − {first.day} = **{gap} days**."
    return chat(f"How many days are there between {first:%d %B %Y} and {last:%d %B %Y}?", text)


def ranking(draw: random.Random) -> Record:
    """Sort facts and compare two."""
    facts, unit, word = draw.choice(((MOUNTAINS, "m", "highest"), (RIVERS, "km", "longest")))
    some = draw.sample(facts, 4)
    order = sorted(some, key=lambda fact: -fact[1])
    rows = "\n".join(f"{i}. {name} ({size:,} {unit})" for i, (name, size) in enumerate(order, 1))
    gap = order[0][1] - order[-1][1]
    return chat(
        f"Put these in order, {word} first: {', '.join(name for name, _ in some)}.",
        f"{rows}\n\nBetween the first and the last there is a difference of {gap:,} {unit}.",
    )


def product(draw: random.Random) -> Record:
    """A multiplication in parts."""
    a, b = draw.randint(12, 89), draw.randint(12, 49)
    tens, ones = b // 10 * 10, b % 10
    if ones == 0:
        return chat(f"{a} * {b}?", f"{a} × {b} = {a * b}.")
    how = f"Split {b} into {tens} and {ones}:\n\n- {a} × {tens} = {a * tens}\n- {a} × {ones} = {a * ones}\n\n"
    how += f"Add them: {a * tens} + {a * ones} = **{a * b}**."
    return chat(f"What is {a} times {b}? Explain how to do it in the head.", how)


def extraction(draw: random.Random) -> Record:
    """A sentence as JSON."""
    name, trade, town, age = draw.choice(NAMES), draw.choice(TRADES), draw.choice(TOWNS), draw.randint(21, 67)
    sentence = draw.choice(
        (
            f"{name} is {age} and works as a {trade} in {town}.",
            f"In {town} we met {name}, a {trade} of {age}.",
            f"The {trade} from {town}, {name}, has just turned {age}.",
        )
    )
    found = json.dumps({"name": name, "occupation": trade, "town": town, "age": age})
    return chat(f'Return name, occupation, town and age as JSON. Text: "{sentence}"', f"```json\n{found}\n```")


def average(draw: random.Random) -> Record:
    """Mean and median of a few numbers."""
    values = [draw.randint(3, 60) for _ in range(5)]
    order = sorted(values)
    return chat(
        f"Find the mean and the median of {', '.join(map(str, values))}.",
        f"Mean: ({' + '.join(map(str, values))}) / 5 = {sum(values)} / 5 = **{sum(values) / 5:g}**\n\n"
        f"Median: sorted they are {', '.join(map(str, order))}, and the third one is **{order[2]}**.",
    )


def inventory(draw: random.Random) -> Record:
    """A table of things in stock."""
    rows = [
        f"| {draw.randint(100, 999)} | {thing} | {draw.choice(TOWNS)} | {draw.randint(1, 40)} | {draw.uniform(4, 180):.2f} | "
        f"{draw.choice(REMARKS)} |"
        for thing in draw.sample(THINGS, 4)
    ]
    return {
        "kind": "structured",
        "lang": "en",
        "text": "| No. | Item | Store | Count | Price | Remark |\n|---:|---|---|---:|---:|---|\n" + "\n".join(rows),
    }


def events(draw: random.Random) -> Record:
    """JSON lines, as programs write them."""
    start = draw.randint(0, 40_000)
    lines = []
    for _ in range(4):
        start += draw.randint(3, 900)
        clock = f"{start // 3600:02}:{start // 60 % 60:02}:{start % 60:02}"
        kind = draw.choice(("door.open", "door.close", "lift.call", "alarm.test", "meter.read"))
        lines.append(json.dumps({"at": clock, "event": kind, "floor": draw.randint(-1, 9), "ok": draw.random() > 0.1}))
    return {"kind": "structured", "lang": "en", "text": "\n".join(lines)}


def equation(draw: random.Random) -> Record:
    """A linear equation, solved."""
    a, x, b = draw.randint(2, 9), draw.randint(-9, 12), draw.randint(1, 30)
    right = a * x + b
    return {
        "kind": "structured",
        "lang": "en",
        "text": f"Solve ${a}x + {b} = {right}$.\n\n$$\\begin{{aligned}} {a}x &= {right} - {b} = {right - b} \\\\ "
        f"x &= \\frac{{{right - b}}}{{{a}}} = {x} \\end{{aligned}}$$\n\nCheck: ${a} \\cdot ({x}) + {b} = {right}$.",
    }


MAKERS: tuple[tuple[Callable[[random.Random], Record], int], ...] = (
    (shopping, 14),
    (conversion, 8),
    (days, 10),
    (ranking, 10),
    (product, 8),
    (extraction, 10),
    (average, 8),
    (inventory, 8),
    (events, 6),
    (equation, 6),
)


def records() -> Iterable[Record]:
    """All records, kinds in turn."""
    draw = random.Random(SEED)
    most = max(count for _, count in MAKERS)
    made = [make(draw) for turn in range(most) for make, count in MAKERS if turn < count]
    return list({json.dumps(record): record for record in made}.values())  # each once


def main() -> None:
    """Write the file."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records())
    TARGET.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
