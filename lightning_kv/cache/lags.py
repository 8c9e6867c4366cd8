"""Reference tables of mean logits by lag: how a head's scores fall or swing with the distance.

Shapes: L layers, H heads, Q query frames, F frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.recorder import LIMIT, Clip, Recorder, weight_of
from lightning_kv.cache.table import summed
from lightning_kv.cache.view import PassView


@dataclass
class LagLogits:
    """Mean logit between the rows of a query frame and of a held frame so many frames back.

    Args:
        clip: Whose it is.
        logits: By namespace, float32 ``[L, H, F]``; place n is a lag of n frames, 0 where there
            was none.
    """

    clip: Clip
    logits: dict[str, Tensor]
    queries: ClassVar[int] = 1
    """Their mean, which stands for all."""


class LagRecorder(Recorder):
    """Mean logits by lag of every layer and head: the product of the mean query and mean key.

    Args:
        limit: See :class:`Recorder`.
    """

    name, makes = "lags", LagLogits

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__(1, limit)
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._weights: dict[tuple[int, str], list[float]] = {}

    def size(self, clip: Clip) -> int:
        """4 bytes for each layer, head and lag, in each namespace."""
        of = clip.geometry
        return 4 * of.layers * of.heads * clip.frames * of.branches

    def note(self, view: PassView) -> None:
        """Add the logits of a pass."""
        clip, step, place = self.clips[view.sample], view.step, (view.sample, view.step.namespace)
        if place not in self._sums:
            shape = (clip.geometry.layers, clip.geometry.heads, clip.frames)
            self._sums[place] = torch.zeros(shape, device=view.device)
            self._weights[place] = [0.0] * clip.frames
        if not view.frames:
            return
        keys = view.by_frame(view.keys("read").transpose(1, 2), "mean")  # [H, D, F]
        queries = view.query.unflatten(1, (len(step.frames), -1)).mean(2)  # [H, Q, D]
        logits = (queries.to(keys) @ keys / keys.shape[1] ** 0.5).flatten(1)
        lags = [now - then for now in step.frames for then in view.frames]
        weight, line = weight_of(step), self._sums[place][view.layer]
        at = upload(lags, line, torch.int64).unsqueeze(0)
        line += summed((weight * logits).to(line).unsqueeze(-1), at, line.shape[1])[..., 0]
        for lag in lags if not view.layer else ():
            self._weights[place][lag] += weight

    def table(self, sample: int) -> LagLogits:
        """Means over passes and pairs of frames."""
        found = {}
        for (owner, namespace), total in self._sums.items():
            if owner == sample:
                weight = total.new_tensor(self._weights[owner, namespace])
                found[namespace] = total / weight.masked_fill(weight == 0, 1.0)
        return LagLogits(self.clips[sample], found)
