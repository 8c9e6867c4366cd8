"""Summaries of frames stand in a window, nearer to each other the older they are."""

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
class Faded(PositionsPart):
    """Summaries of frames stand at whole places of a window, as near to their ages as it allows.

    FadeMem (arXiv 2606.10671). The first frame has the far end, the newest chunk stands before the
    query, and the others, from old to new, take the free place whose warped age is nearest to
    theirs, a place for each. Until the window is full, all stand at their own times.

    Ours: the window ends with the query, however long that is (the authors' code knows chunks of 3
    alone), and is wider where more is held than fits.

    Args:
        window: Frames, the query included; the model's training horizon where None.
        warp: Power of the ages that are compared, above 0.
    """

    name: ClassVar[str] = "faded"
    window: int | None = None
    warp: float = 0.3

    def __post_init__(self) -> None:
        between(self, 1e-3, None, "warp")
        if self.window is not None:
            between(self, 2, None, "window")

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """Of each row that of its frame."""
        start, held, flight = view.step.query_times[0], len(view.frames), view.query_frames
        window = view.geometry.train_horizon if self.window is None else self.window
        reach = max(window - flight, held)
        if not held or view.step.start < reach:
            return (start - view.time).unsqueeze(1)
        bridge = min(view.geometry.chunk or flight, flight, held - 1)
        age = start - view.by_frame(view.time.unsqueeze(1), "max")[:, 0].amax(0).double()
        place = torch.arange(bridge + 1, reach, device=view.device).double()  # free ones
        wanted = age.clamp(bridge + 1, max(reach - 1, bridge + 1)) ** self.warp
        most, found = place[-1:] if len(place) else place, [place.new_full((1,), reach)]
        others = held - 1 - bridge
        for i in range(others):
            least = bridge + others - i  # room for those that come after
            taken = (place < least) | (place > most)
            off = (place**self.warp - wanted[i + 1]).abs().masked_fill(taken, torch.inf)
            found.append(place.gather(0, off.argmin(0, keepdim=True)))
            most = found[-1] - 1
        found.append(torch.arange(bridge, 0, -1, device=view.device).double())
        return view.at_rows(torch.cat(found).view(1, 1, -1)).float()
