r"""KL divergence when only the likeliest tokens of the base are known.

The base's distribution p is known on a set K of tokens (its k likeliest) and, as one number, on everything else. Merging the
other tokens into one outcome "rest" gives

    KL_K = sum_{v in K} p(v) log(p(v) / q(v)) + p(rest) log(p(rest) / q(rest))

which never exceeds KL(p || q): merging outcomes cannot make two distributions easier to tell apart. It is thus a lower bound;
with K holding nearly all of p it is close.

A server lists only the candidate's likeliest tokens L. The tokens of K that are not in L become one outcome U, of which is
known that q(U) is at most |U| times the smallest listed probability, and at most what the listed ones leave over. Within
these bounds q(U) is chosen so that the KL is smallest: a lower bound again, and a large one where the candidate expects
something else entirely.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qguard_edge.verify.drift import MOST_NATS, DocumentDrift

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
LEAST = 1e-12
"""Probability that stands for what rounding has made zero or negative."""


def merged_kl(p_top: FloatArray, q_top: FloatArray) -> FloatArray:
    """KL over the known tokens and the rest.

    Args:
        p_top: the base's log-probabilities of the known tokens, f64 `[n, k]`.
        q_top: the candidate's of the same tokens.

    Returns:
        KL per row in nats, f64 `[n]`, not below 0.
    """
    p, q = np.exp(p_top), np.exp(q_top)
    p_rest, q_rest = np.maximum(1 - p.sum(-1), LEAST), np.maximum(1 - q.sum(-1), LEAST)
    kl = (p * np.minimum(p_top - q_top, MOST_NATS)).sum(-1) + p_rest * np.log(p_rest / q_rest)
    bounded: FloatArray = np.clip(np.nan_to_num(kl, nan=MOST_NATS, posinf=MOST_NATS), 0.0, MOST_NATS)
    return bounded


def compare_rows(
    top_ids: IntArray, p_top: FloatArray, p_next: FloatArray, following: Sequence[int], log_q: npt.NDArray[np.floating]
) -> DocumentDrift:
    """Compare with all of the candidate's log-probabilities.

    Args:
        top_ids: the base's likeliest tokens, `[n, k]`, the likeliest first.
        p_top: their log-probabilities under the base.
        p_next: the base's log-probability of each row's own next token, `[n]`.
        following: these n tokens.
        log_q: the candidate's log-probabilities `[n, n_vocab]`.
    """
    finite: FloatArray = np.nan_to_num(log_q.astype(np.float64), nan=-MOST_NATS, neginf=-MOST_NATS)
    q_top: FloatArray = np.take_along_axis(finite, top_ids, -1)
    loss = p_next - finite[np.arange(len(following)), list(following)]
    same = finite.argmax(-1) == top_ids[:, 0]
    return DocumentDrift(merged_kl(p_top, q_top), same, np.clip(loss, -MOST_NATS, MOST_NATS))


def compare_listed(
    top_ids: Sequence[int],
    p_top: Sequence[float],
    p_next: float,
    following: int,
    listed: Mapping[int, float],
    can_name: Callable[[int], bool],
) -> tuple[float, bool, float]:
    """Compare one row with the log-probabilities a server lists.

    Args:
        top_ids: the base's likeliest tokens, the likeliest first.
        p_top: their log-probabilities under the base.
        p_next: the base's log-probability of the text's own next token.
        following: that token.
        listed: the candidate's likeliest tokens with their log-probabilities; negative ids stand for tokens without a name.
        can_name: whether the server could have listed a token under a name; those it could not are part of the rest.

    Returns:
        KL; whether the top token is the same (also where neither has a name); and log p(next) - log q(next), where both
        count as the smallest listed probability if they are below it or not known.
    """
    floor = min(listed.values())
    known = [i for i, token in enumerate(top_ids) if token in listed]
    unlisted = [i for i, token in enumerate(top_ids) if token not in listed and can_name(token)]
    p, q = [p_top[i] for i in known], [listed[top_ids[i]] for i in known]
    if unlisted:
        p_unlisted = float(np.exp([p_top[i] for i in unlisted]).sum())
        p_left, q_left = 1 - float(np.exp(p).sum()), max(1 - float(np.exp(q).sum()), LEAST)
        proportional = min(p_unlisted / max(p_left, p_unlisted, LEAST), 1.0) * q_left
        most = min(len(unlisted) * float(np.exp(floor)), max(1 - float(np.exp(list(listed.values())).sum()), LEAST))
        p, q = [*p, float(np.log(max(p_unlisted, LEAST)))], [*q, float(np.log(max(min(proportional, most), LEAST)))]
    kl = merged_kl(np.array([p], np.float64), np.array([q], np.float64))[0]
    top = max(listed, key=lambda token: listed[token])
    same = top == top_ids[0] or (top < 0 and not can_name(top_ids[0]))
    named = can_name(following)
    loss = max(p_next, floor) - max(listed.get(following, floor), floor) if named else 0.0
    return float(kl), same, float(np.clip(loss, -MOST_NATS, MOST_NATS))
