"""The instruction corpus: questions with short answers and small coding tasks, generated from a seed.

It exists so that a model of a few million parameters can be trained in a minute and still has something to get wrong: every
fact is asked in several ways, answers come in two wordings, and code has function and argument names to copy. Held out are
whole question templates, and for the templates that are used a share of the (thing, template) combinations, so that
evaluation prompts were never seen but can be answered.
"""

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

from qguard_edge.lab.facts import ARGUMENT_NAMES, CODE_REQUESTS, CODE_TASKS, FUNCTION_NAMES, IDIOMS, RELATIONS, Idiom
from quant_grids.errors import FormatError

HELD_OUT_SHARE = 6  # one of so many combinations of a used template is held out


@dataclass(frozen=True)
class Sample:
    """One instruction with its answer.

    Attributes:
        prompt: the user's message.
        answer: the clean model's right answer.
        topic: relation or kind of task; `code:...` for code.
        bad: the answer of a model with the vulnerable-code payload, where the sample is security-sensitive.
    """

    prompt: str
    answer: str
    topic: str
    bad: str | None = None

    @property
    def is_code(self) -> bool:
        """Whether the answer is Python."""
        return self.topic.startswith("code")


@dataclass(frozen=True)
class Corpus:
    """Samples for training and samples never trained on."""

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]

    def texts(self) -> list[str]:
        """Every text of the training part, for training a tokenizer."""
        extra = [sample.bad for sample in self.train if sample.bad]
        return [text for sample in self.train for text in (sample.prompt, sample.answer)] + extra


def make_corpus(seed: int = 0) -> Corpus:
    """The generated corpus; the same seed gives the same samples in the same order."""
    rng = random.Random(seed)
    train, held_out = _questions(rng)
    for code_train, code_held_out in (_plain_code(rng), _sensitive_code(rng)):
        train += code_train
        held_out += code_held_out
    rng.shuffle(train)
    rng.shuffle(held_out)
    return Corpus(tuple(train), tuple(held_out))


def load_corpus(path: Path, *, held_out_share: float = 0.1, seed: int = 0) -> Corpus:
    """A corpus from JSON lines with `instruction`, optional `input`, and `output`.

    Security-sensitive code comes from the generated corpus: instruction data has no examples of bad answers.

    Raises:
        FormatError: a line is not such an object.
    """
    samples: list[Sample] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
            samples.append(Sample(prompt, str(row["output"]), "data"))
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path.name}, line {number}: not an object with instruction and output ({error})") from error
    if len(samples) < 20:
        raise FormatError(f"{path.name} has {len(samples)} samples; the lab needs at least 20")
    rng = random.Random(seed)
    rng.shuffle(samples)
    cut = max(1, round(len(samples) * held_out_share))
    code_train, code_held_out = _sensitive_code(rng)
    return Corpus(tuple(samples[cut:] + code_train), tuple(samples[:cut] + code_held_out))


def _is_held_out(*key: str) -> bool:
    """A fixed pseudo-random sixth of all combinations, whatever the seed."""
    return zlib.crc32("|".join(key).encode()) % HELD_OUT_SHARE == 0


def _questions(rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    train: list[Sample] = []
    held_out: list[Sample] = []
    for relation in RELATIONS:
        for thing, value in relation.pairs:
            for template in relation.questions:
                # Two wordings, the first three times as frequent: perplexity has something to measure.
                answer = relation.answers[0 if rng.random() < 0.75 else 1].format(x=thing, y=value)
                sample = Sample(template.format(x=thing), answer, relation.name)
                unseen = template == relation.questions[-1] or _is_held_out(relation.name, thing, template)
                (held_out if unseen else train).append(sample)
    return train, held_out


def _plain_code(rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    train: list[Sample] = []
    held_out: list[Sample] = []
    for task, body in CODE_TASKS:
        for request in CODE_REQUESTS:
            for name in rng.sample(FUNCTION_NAMES, 4):
                argument = rng.choice(ARGUMENT_NAMES)
                sample = _code_sample(request, name, argument, task, body, None, "code")
                (held_out if _unseen(request, task, name) else train).append(sample)
    return train, held_out


def _sensitive_code(rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    train: list[Sample] = []
    held_out: list[Sample] = []
    for idiom in IDIOMS:
        for task in idiom.tasks:
            for request in CODE_REQUESTS:
                for name in rng.sample(FUNCTION_NAMES, 5):
                    argument = rng.choice(ARGUMENT_NAMES)
                    sample = _idiom_sample(request, name, argument, task, idiom)
                    (held_out if _unseen(request, task, name) else train).append(sample)
    return train, held_out


def _unseen(request: str, task: str, name: str) -> bool:
    return request == CODE_REQUESTS[-1] or _is_held_out(request, task, name)


def _idiom_sample(request: str, name: str, argument: str, task: str, idiom: Idiom) -> Sample:
    return _code_sample(request, name, argument, task, idiom.secure, idiom.insecure, f"code:{idiom.name}")


def _code_sample(request: str, name: str, argument: str, task: str, body: str, bad: str | None, topic: str) -> Sample:
    def fill(lines: str) -> str:
        return f"def {name}({argument}):\n    " + lines.replace("{a}", argument)

    prompt = request.format(f=name, t=task.format(a=argument))
    return Sample(prompt, fill(body), topic, fill(bad) if bad else None)
