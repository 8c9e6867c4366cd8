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
    """Mean logit between the rows of a query frame and of a frame so many frames back.

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

    Frames that memory has dropped count too, as they were when last held; where positions move with
    the query only held ones do.

    Args:
        limit: See :class:`Recorder`.
    """

    name, makes = "lags", LagLogits

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__(1, limit)
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._weights: dict[tuple[int, str], list[float]] = {}
        self._keys: dict[tuple[int, str, int], Tensor] = {}
        self._known: dict[tuple[int, str, int], set[int]] = {}

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
        frames, keys = self._seen(view)
        queries = view.query.unflatten(1, (len(step.frames), -1)).mean(2)  # [H, Q, D]
        logits = (queries.to(keys) @ keys / keys.shape[1] ** 0.5).flatten(1)
        lags = [now - then for now in step.frames for then in frames]
        weight, line = weight_of(step), self._sums[place][view.layer]
        at = upload(lags, line, torch.int64).unsqueeze(0)
        line += summed((weight * logits).to(line).unsqueeze(-1), at, line.shape[1])[..., 0]
        for lag in lags if not view.layer else ():
            self._weights[place][lag] += weight

    def _seen(self, view: PassView) -> tuple[list[int], Tensor]:
        """Frames that were ever held, and the mean key of each, ``[H, D, F]``."""
        held = view.by_frame(view.keys("read").transpose(1, 2), "mean")
        if view.lag is not None:  # read at other times in every pass: no key can be kept
            return list(view.frames), held
        place = view.sample, view.step.namespace, view.layer
        if place not in self._keys:
            self._keys[place] = held.new_zeros(*held.shape[:2], self.clips[view.sample].frames)
        keys, known = self._keys[place], self._known.setdefault(place, set())
        old = keys[..., view.frame_ids]
        keys[..., view.frame_ids] = torch.where(view.present.unsqueeze(1), held, old)
        known.update(view.frames)
        return sorted(known), keys[..., upload(sorted(known), keys, torch.int64)]

    def table(self, sample: int) -> LagLogits:
        """Means over passes and pairs of frames."""
        found = {}
        for (owner, namespace), total in self._sums.items():
            if owner == sample:
                weight = total.new_tensor(self._weights[owner, namespace])
                found[namespace] = total / weight.masked_fill(weight == 0, 1.0)
        return LagLogits(self.clips[sample], found)
