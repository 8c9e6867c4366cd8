"""Read random frames or rows: the control that any score has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import choice
from lightning_kv.policies.draws import row_draws
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class Random(SelectPart):
    """Read random frames or rows, drawn once per chunk and shared by heads and layers.

    The frames of the chunk before are always read, so that what is lost is memory and not motion.
    The draw depends on the rollout's seed, the prompt's key and the chunk alone. Any budget that
    holds a chunk will do.

    Args:
        granularity: Draw whole ``frame``s, or single ``token``s of any frame.
    """

    name: ClassVar[str] = "random"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "random",
            "Keep everything, read random frames and the last chunk: the control.",
            saves=("reads",),
            parts={"select": {"part": "random", "budget": "9f"}},
        ),
    )

    granularity: str = "frame"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, granularity=("frame", "token"))

    @property
    def unit(self) -> str:
        """As set."""
        return self.granularity

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """One uniform number per frame or row."""
        if self.unit == "token":
            return row_draws(view, f"read in {view.step.chunk}, row of frame").unsqueeze(1)
        rng = random.Random(f"{view.seed} {view.step.chunk}")  # all of a text counts as its seed
        draw = [rng.random() for _ in range(max(view.frames) + 1)]
        own = upload([draw[frame] for frame in view.frames], view.frame_ids, torch.float32)
        return own.view(1, 1, -1)

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The chunk before this one."""
        first = view.step.start - (view.geometry.chunk or view.query_frames)
        if self.unit == "token":
            return (view.frame_id >= first).unsqueeze(1)
        return (view.frame_ids >= first).view(1, 1, -1)

    def smallest(self, chunk: int) -> int:
        """The chunk before."""
        return chunk
