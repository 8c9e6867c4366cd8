"""More for the heads whose scores are spread over more frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.view import CacheView
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.part import BudgetPart, Preset


@dataclass(frozen=True)
class Adaptive(BudgetPart):
    """Heads share one amount: what scores best over all of them is kept.

    Ada-KV (arXiv 2407.11550): the scores of the heads of a layer are ranked together, after each
    head has been given a safe share of its own best. Scores must be comparable between heads, as
    softmax mass is.

    Args:
        amount: Mean over the heads.
        safe: Share of the amount that every head gets, at least what is protected.
        over: Heads of one ``layer``, or of the whole ``model`` (at a commit).
    """

    name: ClassVar[str] = "adaptive"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "ada-kv",
            "Keep the frames that the newest chunk looks at, the best over all heads of a layer; "
            "drop the others.",
            "Ada-KV, arXiv 2407.11550",
            ("memory", "reads"),
            {"retain": {"part": "snap-kv", "budget": {"part": "adaptive", "amount": "9f"}}},
            "safe 0.2, 128 to 1024 tokens of a text on average",
        ),
    )
    compares: ClassVar[bool] = True
    safe: float = 0.2
    over: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, 1, "safe")
        choice(self, over=("layer", "model"))

    @property
    def gathers(self) -> bool:
        """Heads of the whole model share only where all are asked together."""
        return self.over == "model"

    def lengths(
        self,
        views: Sequence[CacheView],
        scores: Sequence[Tensor],
        sizes: Sequence[Tensor],
        protected: Sequence[Tensor],
        state: dict[Any, Any],
    ) -> list[Tensor]:
        """Rows of each head: its own among the best of all."""
        parts = list(zip(views, scores, sizes, protected, strict=True))
        if self.over == "layer":
            return [self._shared([v], [s], [z], [p])[0] for v, s, z, p in parts]
        most, padded = max(x.shape[2] for x in scores), []
        for view, *own in parts:  # layers may hold other numbers of units; a blank has no rows
            wide = [x.expand(view.heads, own[0].shape[1], own[0].shape[2]) for x in own]
            padded.append([torch.nn.functional.pad(x, (0, most - x.shape[2])) for x in wide])
        return self._shared(views, *map(list, zip(*padded, strict=True)))

    def _shared(
        self,
        views: Sequence[CacheView],
        scores: Sequence[Tensor],
        sizes: Sequence[Tensor],
        protected: Sequence[Tensor],
    ) -> list[Tensor]:
        amount = math.floor(self.layer_mean(views[0]) * views[0].geometry.tokens)
        total, safe = amount * len(views) * views[0].heads, round(self.safe * amount)
        return shared(views, total, safe, scores, sizes, protected)


def shared(
    views: Sequence[CacheView],
    total: int,
    safe: int,
    scores: Sequence[Tensor],
    sizes: Sequence[Tensor],
    protected: Sequence[Tensor],
) -> list[Tensor]:
    """Rows of each head where all that are given share a total: its own among the best of all.

    Args:
        views: One of each layer.
        total: Rows of all their heads together.
        safe: Rows of its own best that every head gets first, beside what is protected.
        scores: ``[1 or H, 1 or Q, U]`` of each view.
        sizes: Rows of each unit, alike.
        protected: bool, alike.

    Returns:
        int64 ``[H, Q]`` of each view.
    """
    heads = views[0].heads
    shape = (heads, scores[0].shape[1], scores[0].shape[2])
    score, size, guard = (
        torch.cat([x.expand(shape) for x in each]) for each in (scores, sizes, protected)
    )
    key = score.double().masked_fill(guard, torch.inf).masked_fill(size == 0, -torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    before = size.gather(-1, order).cumsum(-1)
    own = torch.zeros_like(size).scatter(-1, order, before) <= safe
    first = (own | guard) & (size > 0)
    key = key.masked_fill(first, torch.inf).transpose(0, 1).flatten(1)  # [Q, heads x U]
    flat = size.transpose(0, 1).flatten(1)
    order = key.argsort(dim=-1, descending=True, stable=True)
    taken = flat.gather(-1, order).cumsum(-1) <= total
    chosen = torch.zeros_like(taken).scatter(-1, order, taken)
    chosen = chosen.unflatten(1, (len(score), -1)).transpose(0, 1) | first
    rows = (chosen * size).sum(-1)
    return list(rows.split(heads))
