"""What is old appears younger, so that the whole history fits into a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import PositionsPart
from lightning_kv.policies.budgets import part_of
from lightning_kv.policies.checks import between


@dataclass(frozen=True)
class VirtualAge(PositionsPart):
    """Near rows stay where they are; older ones close ranks, so that the first has a fixed age.

    The re-index of CMBench (DeCoPrune): an age above ``near`` becomes ``near`` plus its share, of
    all that is older, of the way from ``near`` to ``far``. Ages may be fractional.

    Ours: at every chunk, not once at the end of what is given; nothing appears older than it is
    (the formula alone would stretch a history shorter than ``far``).

    Args:
        near: Age in frames up to which rows stay where they are; below 1 a share of the model's
            training horizon (of 21 frames the paper's 8).
        far: Age at which the first frame of the video appears, alike (of 21 frames the paper's 17).
    """

    name: ClassVar[str] = "virtual-age"
    near: float = 0.381
    far: float = 0.81

    def __post_init__(self) -> None:
        between(self, 0, None, "near", "far")

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """Ages against the start of the query, those beyond ``near`` squeezed."""
        start, horizon = view.step.query_times[0], view.geometry.train_horizon
        near, far = part_of(self.near, horizon), part_of(self.far, horizon)
        age = start - view.time
        scale = max(far - near, 0) / max(start - near, far - near, 1e-6)
        return torch.where(age > near, near + (age - near) * scale, age).unsqueeze(1)
