"""What a session asks of whoever decides."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild, Recode, Retention, Selection
from lightning_kv.cache.rows import Group
from lightning_kv.cache.view import CacheView


class Decider(Protocol):
    """A cache policy at work on one sample: five answers, with their state."""

    moves: bool
    opens: bool
    columns: dict[str, str]
    needs: dict[str, dict[str, Any]]
    bias: str | None

    def branch(self) -> Decider:
        """The decider of the same sample in another namespace (under guidance)."""
        ...

    def open(self, view: CacheView) -> Retention | None:
        """What stays, asked in the first pass of a chunk, before attention."""
        ...

    def select(self, view: CacheView) -> Selection | None:
        """What these queries read; everything where None."""
        ...

    def times(self, view: CacheView, group: Group) -> Tensor:
        """Rotary time at which the rows of a group appear, ``[1 or h, N]``."""
        ...

    def commit(self, views: list[CacheView]) -> list[Retention | None] | Rebuild | None:
        """What stays, asked after the commit pass for all layers together."""
        ...

    def recode(self, views: list[CacheView]) -> list[list[Recode]]:
        """Which rows get which codec, per layer."""
        ...

    def event(
        self, event: Event, views: list[CacheView]
    ) -> list[Retention | None] | Rebuild | None:
        """The answer to an event."""
        ...
