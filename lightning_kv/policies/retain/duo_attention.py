"""Everything for heads that look back, the sink and the last frame for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.labels import heads_of, labelled
from lightning_kv.policies.part import Preset
from lightning_kv.policies.tables import AUTO, HeadTable

METHODS = "duo-attention forcing-kv"
KINDS = {"static": 0, "dynamic": 1, "streaming": 0, "retrieval": 1}


@dataclass(frozen=True)
class DuoAttention(RetainPart):
    """Retrieval heads keep everything, streaming heads the sink and the last frame.

    DuoAttention (arXiv 2410.10819). With a budget retrieval heads keep the sink and the newest
    frames, as many as it allows; nothing is dropped in any head while all fits.

    Ours: the paper keeps 128 and 256 words of a text; here it is frames. It trains the gates that
    tell heads apart; here labels go by what each head loses with what streaming heads keep, as
    ``lightning-kv calibrate`` measures it. Where none of these are shipped they are those of
    Forcing-KV, whose static heads look at what streaming heads keep. Gates of the authors' files
    are read as labels, by ``threshold``. A prompt switch changes nothing.

    Args:
        sink: First frames of the video that stay.
        recent: Newest frames that streaming heads keep.
        threshold: Where labels are numbers, retrieval heads have this or more.
        labels: ``streaming`` (0) or ``retrieval`` (1) for each head, or in Forcing-KV's words
            ``static`` or ``dynamic``; ``auto``: those of the model.
    """

    name: ClassVar[str] = "duo-attention"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "duo-attention",
            "Keep everything for retrieval heads; the first and the last frame for others.",
            "DuoAttention, arXiv 2410.10819",
            ("memory", "reads"),
            {"retain": {"part": "duo-attention", "budget": None}},
            "retrieval heads without a budget",
        ),
    )
    comparable: ClassVar[bool] = False
    sink: int = 1
    recent: int = 1
    threshold: float = 0.5
    labels: HeadTable = AUTO

    def __post_init__(self) -> None:
        between(self, 0, None, "sink")
        between(self, 1, None, "recent")
        between(self, 0, 1, "threshold")
        labels = labelled(self, KINDS, self.threshold, METHODS)
        object.__setattr__(self, "labels", labels)

    def smallest(self, chunk: int) -> int:
        """Sink and last frames."""
        return self.sink + self.recent

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The labels are those of the model."""
        self.labels.check_heads(geometry, "head labels", METHODS)

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The sink."""
        return (view.frame_ids < self.sink).view(1, 1, -1)

    def kept(self, view: CacheView, units: Tensor | None, state: Any) -> Retention | None:
        """What the budget leaves to retrieval heads; sink and last frames of the others."""
        ids, made = view.frame_ids, view.step.final[-1] + 1
        rows = self.rows(view) if self.budget else None
        if rows and made * view.geometry.tokens <= min(rows):
            return None
        few = ((ids < self.sink) | (ids >= made - self.recent)).unsqueeze(0)
        many = torch.ones_like(few) if units is None else units[:, 0]
        own = torch.where(heads_of(view, self.labels, "retrieval", "dynamic"), many, few)
        return Retention(keep=view.rows_of(own & view.present))
