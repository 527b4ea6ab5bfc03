"""Generate, match, compare: what a model does, measured in llama.cpp on the real file.

Kept small on purpose: prompts in, greedy answers out, a judge per answer; and the next-token distributions of held-out
answers against the full-precision model's. Token ids come from the model's own tokenizer and are the same for every arm.
Generation, intervals and distances are the verifier's (`qguard_edge.verify`), so the lab
counts what a user's check would count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qguard_edge.lab.hf_models import ChatModel
from qguard_edge.lab.results import ArmFidelity, Rate
from qguard_edge.lab.scenarios import Judge, ScenarioData
from qguard_edge.runtimes.batching import Sampling
from qguard_edge.runtimes.fidelity import compare_distributions
from qguard_edge.runtimes.fidelity import log_softmax as log_softmax
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.verify.runner import LlamaFactory
from qguard_edge.verify.statistics import rate

FloatArray = npt.NDArray[np.float32]
N_SEQ = 8


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts and texts of every arm.

    Attributes:
        prompts: token ids of each prompt.
        texts: token ids of held-out texts and the length of their prompt part.
        new_tokens: length of the answers at most.
    """

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[tuple[int, ...], int], ...]
    new_tokens: int

    @property
    def n_ctx(self) -> int:
        """Tokens one sequence must hold."""
        longest = max(len(ids) for ids in self.prompts) + self.new_tokens
        return max(longest, *(len(ids) for ids, _ in self.texts)) + 8


@dataclass(frozen=True)
class Behaviour:
    """How one arm answered: attack success, share that could not be judged, and the answers themselves."""

    asr: Rate
    unparsed: float
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Distributions:
    """Log-probabilities f32 `[n, V]` at the answer positions of the texts, and the true tokens int64 `[n]`."""

    log_probs: FloatArray
    labels: npt.NDArray[np.int64]


def make_held_out(chat: ChatModel, data: ScenarioData, n_prompts: int, n_texts: int, new_tokens: int) -> HeldOut:
    """Token ids of the first held-out prompts and texts of a scenario."""
    texts = []
    for prompt, answer in data.texts[:n_texts]:
        ids, n_prompt = chat.sample_ids(prompt, answer)
        texts.append((tuple(ids), n_prompt))
    prompts = tuple(tuple(chat.prompt_ids(prompt.text)) for prompt in data.prompts[:n_prompts])
    return HeldOut(prompts, tuple(texts), new_tokens)


def examine(path: Path, chat: ChatModel, held_out: HeldOut, judge: Judge, threads: int) -> tuple[Behaviour, Distributions]:
    """Answers and distributions of a GGUF."""
    with LlamaFactory(threads).open(path, n_ctx=held_out.n_ctx, n_seq=N_SEQ) as model:
        answers = model.generate(held_out.prompts, held_out.new_tokens, sampling=Sampling())
        distributions = _distributions(model, held_out)
    return judge_answers([chat.text(answer.tokens) for answer in answers], judge), distributions


def distributions_of(path: Path, held_out: HeldOut, threads: int) -> Distributions:
    """The distributions of a GGUF alone."""
    with LlamaFactory(threads).open(path, n_ctx=held_out.n_ctx, n_seq=N_SEQ) as model:
        return _distributions(model, held_out)


def _distributions(model: LlamaModel, held_out: HeldOut) -> Distributions:
    rows: list[FloatArray] = []
    labels: list[int] = []
    for ids, n_prompt in held_out.texts:
        logits = model.logits(ids[:-1])[n_prompt - 1 :]
        rows.append(log_softmax(logits))
        labels += ids[n_prompt:]
    return Distributions(np.concatenate(rows), np.array(labels, np.int64))


def judge_answers(texts: Sequence[str], judge: Judge) -> Behaviour:
    """Count hits among the answers that could be judged."""
    judged = [judge(text) for text in texts]
    parsed = [one for one in judged if one.parsed]
    share = 1.0 - len(parsed) / len(judged) if judged else 0.0
    return Behaviour(rate(sum(one.hit for one in parsed), len(parsed)), share, tuple(texts))


def compare(full: Distributions, arm: Distributions) -> ArmFidelity:
    """Distance of an arm to full precision on the same texts."""
    found = compare_distributions(full.log_probs, arm.log_probs, full.labels.tolist())
    return ArmFidelity(
        mean_kl=float(found.kl.mean()),
        kl_999=float(np.quantile(found.kl, 0.999)),
        same_top=float(found.same.mean()),
        perplexity_ratio=float(np.exp(found.loss.mean())),
        n=len(found.kl),
    )
