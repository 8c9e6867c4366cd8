"""What could not be measured, and why: said to who has a Trainer of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_kv.utilities.formatting import several

Thing = TypeVar("Thing")

Problem = tuple[str, str, str]
"""Name of the policy; of the metric or its encoder, empty for a clip that failed; and the reason.
"""


def gathered(own: Iterable[Thing], trainer: L.Trainer) -> list[Thing]:
    """What all ranks have, in the order of ranks; every rank has to call this."""
    own = list(own)
    if trainer.world_size == 1:
        return own
    found: list[list[Thing]] = [[]] * trainer.world_size
    torch.distributed.all_gather_object(found, own)
    return [each for part in found for each in part]


def warn_missing(missing: Mapping[str, str]) -> None:
    """Name the metrics that are unavailable, before anything is measured.

    Args:
        missing: Reasons by metric.
    """
    for metric, why in missing.items():
        rank_zero_warn(f"The metric '{metric}' is unavailable and will have no value. {why}")


def warn_lacking(
    metric: str, names: Iterable[str], kinds: Iterable[str], problems: Counter[Problem], usual: str
) -> None:
    """Say of which names a metric has no value at all, and why not.

    Args:
        metric: Which.
        names: Of policies or folders.
        kinds: What problems of it are called: the metric, its encoder.
        problems: Of all clips.
        usual: The reason where there are no problems.
    """
    names, kinds = list(names), {*kinds, ""}
    reasons: Counter[str] = Counter()
    for (name, what, why), clips in problems.items():
        if name in names and what in kinds:
            reasons[why.rstrip(".")] += clips
    said = [f"{several(clips, 'clip')}: {why}" for why, clips in reasons.most_common()]
    rank_zero_warn(
        f"The metric '{metric}' has no value for {', '.join(names)}. {'; '.join(said) or usual}."
    )
