"""Windows that are refilled from an archive beside them.

Shapes: none; windows, archives and slots are whole numbers of frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_kv.cache.checks import named
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.budgets import Amount


@dataclass(frozen=True)
class ArchivingPart(RetainPart):
    """A window that is refilled from an archive.

    The budget is the window: what a chunk can read. The archive lies beside it, and is counted in
    bytes; a budget in bytes is divided between both.
    """

    def held(self, window: int, chunk: int) -> int:
        """Frames of window and archive together, for a window of so many."""
        raise NotImplementedError

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """All heads have the same window, and its length does not change."""
        self.evenly()
        if self.budget is not None and Amount.parse(self.budget.amount).unit == "share":
            raise ValueError(
                f"The budget {self.budget.amount} of {self.name!r} is a share, which grows with "
                "the video, but its archive is filled once. Give frames (18f), tokens or bytes."
            )

    def window(self, view: CacheView, state: dict[Any, Any]) -> int:
        """Frames of the window, found when it is first asked for.

        Raises:
            ValueError: Bytes are too few.
        """
        if "window" not in state:
            chunk = view.geometry.chunk or view.query_frames
            least, found = self.smallest(chunk), int(self.budget.frames(view))
            if Amount.parse(self.budget.amount).unit == "B":
                most = found
                while found >= least and self.held(found, chunk) > most:
                    found -= 1
                if found < least:
                    raise ValueError(
                        f"{named(self, view)} has a budget of {self.budget.amount}, which is "
                        f"{most} frames; its window and archive are {self.held(least, chunk)} or "
                        "more. Give more bytes."
                    )
            state["window"] = max(found, least)
        return state["window"]


def played(slot: int, period: int) -> int:
    """The frame that plays in a slot: forwards through the first ones, backwards, and so on."""
    run, place = divmod(slot, period)
    return period - 1 - place if run % 2 else place
