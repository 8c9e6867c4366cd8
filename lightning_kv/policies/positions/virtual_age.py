"""What is old appears younger, so that the whole history fits into a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import PositionsPart
from lightning_kv.policies.checks import between


@dataclass(frozen=True)
class VirtualAge(PositionsPart):
    """Near rows stay where they are; older ones close ranks, so that the first has a fixed age.

    The re-index of CMBench (DeCoPrune): an age above ``near`` becomes ``near`` plus its share, of
    all that is older, of the way from ``near`` to ``far``. Ages may be fractional.

    Ours: at every chunk, not once at the end of what is given; nothing appears older than it is
    (the formula alone would stretch a history shorter than ``far``).

    Args:
        near: Age in frames up to which rows stay where they are.
        far: Age at which the first frame of the video appears.
    """

    name: ClassVar[str] = "virtual-age"
    near: float = 8
    far: float = 17

    def __post_init__(self) -> None:
        between(self, 0, None, "near")
        between(self, self.near, None, "far")

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """Ages against the start of the query, those beyond ``near`` squeezed."""
        start = view.step.query_times[0]
        age = start - view.time
        scale = (self.far - self.near) / max(start - self.near, self.far - self.near, 1e-6)
        return torch.where(age > self.near, self.near + (age - self.near) * scale, age).unsqueeze(1)
