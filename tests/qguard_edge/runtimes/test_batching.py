"""Many sequences at a time in llama.cpp: the answers of each alone, and what they begin with decoded once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qguard_edge.runtimes.batching import CIRCLE, PromptError, Row, Sampling, choose, generate, repeats, shared_prefix
from qguard_edge.runtimes.llama_native import FloatArray, NativeModel
from tests.helpers.lab_files import LabFiles


def test_batched_answers_are_those_of_one_sequence(injection: LabFiles) -> None:
    texts = [prompt.text for prompt in injection.suite.prompts[:20]]
    with (
        NativeModel(injection.attacked, n_ctx=256, n_threads=1) as one,
        NativeModel(injection.attacked, n_ctx=256, n_threads=1, n_seq=6) as many,
    ):
        prompts = [one.tokenize(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in texts]
        prompts.append(prompts[3] * 4)  # a long one in between
        assert shared_prefix(prompts) >= 2
        alone = [generate(one, [prompt], 20)[0] for prompt in prompts]
        together = generate(many, prompts, 20)
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    assert same >= len(prompts) - 1  # a tie between two tokens may fall either way in another batch
    assert any(answer.ended for answer in together)


class Counting(NativeModel):
    """Counts the tokens it is fed."""

    fed = 0

    def decode(self, rows: Sequence[Row]) -> FloatArray:
        self.fed += len(rows)
        return super().decode(rows)


def test_what_all_prompts_begin_with_is_decoded_once(injection: LabFiles) -> None:
    texts = [prompt.text for prompt in injection.suite.prompts[:20]]
    with Counting(injection.attacked, n_ctx=256, n_threads=1, n_seq=6) as model:
        head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        prompts = [model.tokenize(f"{head}{text}<|im_end|>\n<|im_start|>assistant\n") for text in texts]
        answers = generate(model, prompts, 12)
        shared = shared_prefix(prompts)
        own = sum(len(prompt) - shared for prompt in prompts)
        said = sum(len(answer.tokens) - (not answer.ended) for answer in answers)  # the last token is not fed when it is cut
    assert shared > 10
    assert model.fed == shared + own + said


def test_what_goes_round_in_circles() -> None:
    for circle in ([7], [1, 2, 3], list(range(CIRCLE)), list(range(11))):
        tokens = [99, *circle * 60]
        found = next(n for n in range(len(tokens)) if repeats(tokens[:n]))
        whole = -(-CIRCLE // len(circle)) * len(circle)  # a circle of few tokens is one of a multiple of them
        assert found == 1 + 3 * whole
        assert not repeats([*tokens[:found], 98])
    assert not repeats([])
    assert not repeats(list(range(CIRCLE)) * 2)
    assert not repeats([*range(CIRCLE), 5, *range(CIRCLE), 6, *range(CIRCLE)])


def test_an_answer_ends_where_it_goes_round_in_circles(tiny_base: Path) -> None:
    """A model of random weights, which soon does. One prompt at a time: a shorter answer changes the batches of the others."""
    prompts = [[first, first + 1, first + 2] for first in range(5, 17)]
    with NativeModel(tiny_base, n_ctx=256, n_threads=1) as model:
        whole = generate(model, prompts, 200)
        ended = generate(model, prompts, 200, sampling=Sampling(stop_at_repeats=True))
        drawn = Sampling(0.1, stop_at_repeats=True)
        assert generate(model, prompts[:2], 200, sampling=drawn) == generate(model, prompts[:2], 200, sampling=Sampling(0.1))
    assert sum(len(short.tokens) < len(long.tokens) for short, long in zip(ended, whole, strict=True)) > 3
    for short, long in zip(ended, whole, strict=True):
        cut = next((n for n in range(len(long.tokens)) if repeats(long.tokens[:n])), None)
        assert (cut is None and short == long) or (len(short.tokens) == cut and not short.ended)


def test_prompts_that_do_not_fit(injection: LabFiles) -> None:
    with NativeModel(injection.attacked, n_ctx=32, n_threads=1) as model:
        with pytest.raises(PromptError, match="prompt 2"):
            generate(model, [[5], [5] * 30], 10)
        with pytest.raises(PromptError, match="no token"):
            generate(model, [[]], 10)
        assert [answer.tokens for answer in generate(model, [[5], [6]], 0)] == [(), ()]


def test_sampling_follows_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    uniform = np.random.default_rng(0).random(20_000)
    drawn = np.bincount([choose(logits, 1.0, u) for u in uniform], minlength=3) / len(uniform)
    assert drawn == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    assert choose(logits, 0.01, 0.999) == 0
    assert Sampling().temperature == 0
