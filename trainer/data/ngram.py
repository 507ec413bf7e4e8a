"""The baseline of a language model: an n-gram, counted in the training part of a text.

Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999) with a discount for each order (Ney et al. 1994):
p(w | h) = max(c(hw) - d, 0) / c(h) + d t(h) / c(h) p(w | h'), where t(h) is how many different tokens follow h, and h'
is h without its first token. Below the highest order c says how many different tokens precede. The lowest is uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NONE = -1  # the id of a gram that is not in the training part, or would begin before it


@dataclass(frozen=True)
class Grams:
    """The different grams of one order in a text."""

    codes: Ints  # of each, sorted: the id of the gram without its last token, times the vocabulary, plus that token
    contexts: Ints  # of each, the id of the gram without its last token
    counts: Ints
    ends: Ints  # where each first ends
    ids: Ints  # at each position of the text, of the gram that ends there


def nats(train: Ints, held_out: Ints, vocabulary: int, order: int) -> NDArray[np.float64]:
    """What each held-out token costs, given the `order` - 1 before it, of which the first few have less.

    Both texts are ids below `vocabulary`. Time and memory grow as `order` times the length of the training text.
    """
    grams, matches = [], []
    before, held_out_before = np.zeros_like(train), np.zeros_like(held_out)  # the id of the context at each position
    for _ in range(order):
        grams.append(_count(before, train, vocabulary))
        matches.append((held_out_before, _find(grams[-1].codes, held_out_before, held_out, vocabulary)))
        before, held_out_before = _shifted(grams[-1].ids), _shifted(matches[-1][1])
    probability = np.full(len(held_out), 1 / vocabulary)
    for k, (own, (contexts, ids)) in enumerate(zip(grams, matches, strict=True)):
        counts = own.counts
        if k + 1 < order:  # a gram of the next order ends where one of this order does
            longer = grams[k + 1]
            counts = np.maximum(np.bincount(own.ids[longer.ends], minlength=len(counts)), 1)
        probability = _interpolated(own.contexts, counts, contexts, ids, probability)
    return -np.log(probability)


def _count(contexts: Ints, tokens: Ints, vocabulary: int) -> Grams:
    ends = np.flatnonzero(contexts != NONE)
    codes, first, inverse, counts = np.unique(
        contexts[ends] * vocabulary + tokens[ends], return_index=True, return_inverse=True, return_counts=True
    )
    ids = np.full(len(tokens), NONE)
    ids[ends] = inverse
    return Grams(codes, codes // vocabulary, counts, ends[first], ids)


def _find(codes: Ints, contexts: Ints, tokens: Ints, vocabulary: int) -> Ints:
    """The ids of the grams that end at each position of another text."""
    wanted = contexts * vocabulary + tokens
    ids = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
    return np.where((contexts != NONE) & (codes[ids] == wanted), ids, NONE)


def _shifted(ids: Ints) -> Ints:
    return np.concatenate([[NONE], ids[:-1]])


def _interpolated(contexts_of_grams: Ints, counts: Ints, contexts: Ints, ids: Ints, lower: Any) -> Any:
    """Probabilities of one order from those of the order below; at unknown contexts these remain."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice) if once else 0.5  # above 0, so that nothing is impossible
    total, types = np.bincount(contexts_of_grams, counts), np.bincount(contexts_of_grams)
    known = np.flatnonzero((contexts != NONE) & (contexts < len(total)))
    h, w = contexts[known], ids[known]
    known, h, w = (column[total[h] > 0] for column in (known, h, w))  # the last gram of a text has no successor
    probability = lower.copy()
    kept = np.where(w == NONE, 0, np.maximum(counts[w] - discount, 0))
    probability[known] = (kept + discount * types[h] * lower[known]) / total[h]
    return probability
