"""The same number of frames for every head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import BudgetPart


@dataclass(frozen=True)
class Uniform(BudgetPart):
    """The same number of frames for every head of every layer."""

    name: ClassVar[str] = "uniform"

    def fewest(self, view: CacheView) -> float:
        """The amount."""
        return self.frames(view)

    def lengths(self, score: Tensor, view: CacheView) -> Tensor:
        """The amount, rounded down to whole frames."""
        frames = math.floor(self.frames(view))
        return torch.full((len(score), 1), frames, dtype=torch.int64, device=score.device)
