"""A policy at work on one sample: what the session asks, and what the parts remember."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild, Recode, Retention, Selection
from lightning_kv.cache.rows import Group
from lightning_kv.cache.view import CacheView

if TYPE_CHECKING:
    from lightning_kv.policies.base import CachePolicy


@dataclass
class PolicyRun:
    """A policy with the state of one sample: what the session asks.

    Args:
        policy: The configuration.
        states: State of each part.
    """

    policy: CachePolicy
    states: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in ("retain", "select", "positions", "precision"):
            self.states[kind] = getattr(self.policy, kind).fresh()

    @property
    def moves(self) -> bool:
        """Whether keys must be held raw."""
        return self.policy.positions.moves

    @property
    def opens(self) -> bool:
        """Whether retention is asked in the first pass of a chunk."""
        return self.policy.retain.when == "open"

    @property
    def columns(self) -> dict[str, str]:
        """Row columns that the parts declare, with their reducers."""
        return self.policy.columns

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """Statistics to collect."""
        return self.policy.needs

    @property
    def bias(self) -> str | None:
        """The policy's logit bias."""
        return self.policy.bias

    def open(self, view: CacheView) -> Retention | None:
        """See :class:`~lightning_kv.cache.session.Decider`."""
        answer = self.policy.retain.decide([view], self.states["retain"])
        if isinstance(answer, Rebuild):
            raise ValueError(
                f"The retain part of {self.policy.name!r} answered an open pass with Rebuild, "
                "which needs all layers. Answer so at commit or at an event."
            )
        return answer[0] if answer else None

    def select(self, view: CacheView) -> Selection | None:
        """See :class:`~lightning_kv.cache.session.Decider`."""
        return self.policy.select.pick(view, self.states["select"])

    def times(self, view: CacheView, group: Group) -> Tensor:
        """See :class:`~lightning_kv.cache.session.Decider`."""
        return self.policy.positions.times(view, group, self.states["positions"])

    def commit(self, views: list[CacheView]) -> list[Retention | None] | Rebuild | None:
        """See :class:`~lightning_kv.cache.session.Decider`."""
        if self.opens:
            return None
        return self.policy.retain.decide(views, self.states["retain"])

    def recode(self, views: list[CacheView]) -> list[list[Recode]]:
        """See :class:`~lightning_kv.cache.session.Decider`."""
        return [self.policy.precision.assign(view, self.states["precision"]) for view in views]

    def event(
        self, event: Event, views: list[CacheView]
    ) -> list[Retention | None] | Rebuild | None:
        """See :class:`~lightning_kv.cache.session.Decider`."""
        return self.policy.retain.event(event, views, self.states["retain"])
