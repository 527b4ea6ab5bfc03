"""The runner in transformers: batches, transformers' own loop, logits in chunks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qguard_edge.runtimes.batching import Answer, PromptError, Sampling, repeats
from qguard_edge.runtimes.bnb import load_exactly
from qguard_edge.runtimes.hf import end_tokens, load_tokenizer
from qguard_edge.verify.folder_subject import FolderFactory
from tests.helpers.lab_files import TEXTS, Folders


def some_prompts(folder: Path) -> list[list[int]]:
    """Prompts of many lengths."""
    tokenizer = load_tokenizer(folder)
    return [tokenizer.tokenize(text, parse_special=False)[: 3 + 5 * i] for i, text in enumerate(TEXTS[:10])]


@pytest.mark.parametrize("which", ["hardened", "attacked"])
def test_a_batch_padded_on_the_left_answers_as_each_prompt_alone(folders: Folders, which: str) -> None:
    folder: Path = getattr(folders, which)
    prompts = some_prompts(folder)
    assert len(set(map(len, prompts))) > 5
    factory = FolderFactory(torch.device("cpu"), None, 1)
    with factory.open(folder, n_ctx=256, n_seq=10) as many, factory.open(folder, n_ctx=256, n_seq=1) as one:
        for sampling in (Sampling(), Sampling(0.8, seed=3)):
            together = many.generate(prompts, 24, sampling=sampling)
            alone = one.generate(prompts, 24, sampling=sampling)
            assert together == alone
        assert len(many.generate(prompts, 24, sampling=Sampling(), first_index=3)) == len(prompts)
        assert any(answer.ended for answer in together)
        assert many.generate(prompts, 0, sampling=Sampling()) == [Answer((), ended=False)] * len(prompts)
        with pytest.raises(PromptError, match="prompt 2"):
            many.generate([[5], [5] * 250], 10, sampling=Sampling())


def test_answers_are_those_of_transformers_own_loop(folders: Folders) -> None:
    """The oracle: `generate` without padding, greedily, with nothing but the end tokens."""
    model = load_exactly(folders.hardened, dtype=torch.float32, device=torch.device("cpu"))
    ends = end_tokens(model, load_tokenizer(folders.hardened))
    prompts = some_prompts(folders.hardened)
    factory = FolderFactory(torch.device("cpu"), None, 1)
    with factory.open(folders.hardened, n_ctx=256, n_seq=10) as runner:
        ours = runner.generate(prompts, 16, sampling=Sampling())
    for prompt, answer in zip(prompts, ours, strict=True):
        made = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=16,
            do_sample=False, eos_token_id=sorted(ends), pad_token_id=0,
        )[0, len(prompt):].tolist()  # fmt: skip
        cut = next((i for i, token in enumerate(made) if token in ends), len(made))
        assert list(answer.tokens) == made[:cut]


def test_answers_end_where_they_go_round_in_circles(folders: Folders) -> None:
    factory, stop = FolderFactory(torch.device("cpu"), None, 1), Sampling(stop_at_repeats=True)
    prompts = [[token] * 4 for token in range(20, 40)]
    with factory.open(folders.attacked, n_ctx=256, n_seq=20) as runner:
        runner.ends = frozenset()  # so that answers go on
        whole = runner.generate(prompts, 150, sampling=Sampling())
        ended = runner.generate(prompts, 150, sampling=stop)
    cuts = [next((n for n in range(150) if repeats(answer.tokens[:n])), 150) for answer in whole]
    assert sum(cut < 150 for cut in cuts) > 3
    assert [answer.tokens for answer in ended] == [answer.tokens[:cut] for answer, cut in zip(whole, cuts, strict=True)]


def test_logits_in_chunks_are_those_of_one_pass(folders: Folders) -> None:
    tokens = load_tokenizer(folders.attacked).tokenize(TEXTS[0])
    model = load_exactly(folders.attacked, dtype=torch.float32)
    with torch.inference_mode():
        whole = model(torch.tensor([tokens])).logits[0].numpy()
    factory = FolderFactory(torch.device("cpu"), None, 1)
    with factory.open(folders.attacked, n_ctx=512, n_batch=7, role="base") as runner:
        pieces = list(runner.logits_chunks(tokens))
    assert {len(piece) for piece in pieces[:-1]} == {7}
    assert np.concatenate(pieces) == pytest.approx(whole, abs=1e-4)
