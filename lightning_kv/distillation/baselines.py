"""What rankings say of lists: that of a scorer, and those by hand that it is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_kv.distillation.judging import random_scores
from lightning_kv.distillation.lists import Lists
from lightning_kv.policies.scorer.artifact import PRIORS, Scorer
from lightning_kv.policies.scorer.features import FEATURES
from lightning_kv.policies.statistics import standardised

HAND_MADE = {
    **PRIORS,
    "running-mass": {"running-mass": 1.0},
    "logit": {"logit": 1.0},
}
"""Weights of standardised features."""


def by_hand(lists: Lists, weights: dict[str, float]) -> Tensor:
    """Scores ``[N, U]`` of a weighted sum of features, standardised within each list.

    Args:
        lists: With all features, in order.
        weights: By name.
    """
    every, columns = list(FEATURES), lists.features.transpose(1, 2)  # [N, K, U]
    found = [
        weight * standardised(columns[:, every.index(name)], lists.candidate)
        for name, weight in weights.items()
    ]
    return sum(found[1:], found[0])


def by_scorer(lists: Lists, scorer: Scorer) -> Tensor:
    """Scores ``[N, U]`` of a scorer; 0 where there is no candidate.

    Args:
        lists: With all features, in order.
        scorer: Is shown those that it looks at.
    """
    every = list(FEATURES)
    shown = lists.features[..., [every.index(name) for name in scorer.features]]
    with torch.no_grad():
        found = scorer.scores(shown, lists.context, lists.layer, lists.head, lists.candidate)
    return found.masked_fill(~lists.candidate, 0.0)


BASELINES: dict[str, Callable[[Lists], Tensor]] = {
    **{name: (lambda lists, own=own: by_hand(lists, own)) for name, own in HAND_MADE.items()},
    "random": random_scores,
    "oracle": lambda lists: lists.target,
}
"""Scores of the frames of lists, by name: ``h2o`` is total mass, ``snap-kv`` the last mass,
``future`` what past queries would look at one to four chunks on, ``oracle`` the targets."""
