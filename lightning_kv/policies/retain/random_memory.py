"""Keep random frames or rows: the control that any memory has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.draws import row_draws
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class RandomMemory(UnitPart):
    """Keep random frames or rows and the newest chunk, the same in all heads and layers.

    Every frame (``granularity: token``: every row) draws one number when it is made, and the
    largest stay: a reservoir, in which each of the past is held with the same probability (Vitter
    1985). Draws depend on the rollout's seed, the prompt's key, the frame and the place alone. Any
    budget that holds a chunk will do.
    """

    name: ClassVar[str] = "random-memory"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "random-memory",
            "Keep random frames of the past and the newest chunk, drop the others: the control.",
            saves=("memory", "reads"),
            parts={"retain": {"part": "random-memory", "budget": "9f"}},
        ),
    )

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """One uniform number per frame or row."""
        if self.unit == "token":
            return row_draws(view, "row of frame").unsqueeze(1)
        draw = [random.Random(f"{view.seed} frame {frame}").random() for frame in view.frames]
        return upload(draw, view.frame_ids, torch.float32).view(1, 1, -1)
