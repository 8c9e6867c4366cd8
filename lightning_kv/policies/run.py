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
        said: The last answers, where another branch follows them; by question and layer.
    """

    policy: CachePolicy
    states: dict[str, Any] = field(default_factory=dict)
    said: dict[Any, Any] = field(default_factory=dict)

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

    def branch(self) -> PolicyRun | Follower:
        """A run of its own, or one that follows this one, as the policy says."""
        return Follower(self) if self.policy.branches == "shared" else PolicyRun(self.policy)

    def _say(self, question: Any, answer: Any) -> Any:
        if self.policy.branches == "shared":
            self.said[question] = answer
        return answer

    def open(self, view: CacheView) -> Retention | None:
        """See :class:`~lightning_kv.cache.decider.Decider`."""
        answer = self.policy.retain.decide([view], self.states["retain"])
        if isinstance(answer, Rebuild):
            raise ValueError(
                f"The retain part of {self.policy.name!r} answered an open pass with Rebuild, "
                "which needs all layers. Answer so at commit or at an event."
            )
        return self._say(("open", view.layer), answer[0] if answer else None)

    def select(self, view: CacheView) -> Selection | None:
        """See :class:`~lightning_kv.cache.decider.Decider`."""
        chosen = self.policy.select.pick(view, self.states["select"])
        return self._say(("select", view.layer), chosen)

    def times(self, view: CacheView, group: Group) -> Tensor:
        """See :class:`~lightning_kv.cache.decider.Decider`."""
        return self.policy.positions.times(view, group, self.states["positions"])

    def commit(self, views: list[CacheView]) -> list[Retention | None] | Rebuild | None:
        """See :class:`~lightning_kv.cache.decider.Decider`."""
        if self.opens:
            return None
        return self._say("commit", self.policy.retain.decide(views, self.states["retain"]))

    def recode(self, views: list[CacheView]) -> list[list[Recode]]:
        """See :class:`~lightning_kv.cache.decider.Decider`."""
        found = [self.policy.precision.assign(view, self.states["precision"]) for view in views]
        return self._say("recode", found)

    def event(
        self, event: Event, views: list[CacheView]
    ) -> list[Retention | None] | Rebuild | None:
        """See :class:`~lightning_kv.cache.decider.Decider`."""
        return self._say("event", self.policy.retain.event(event, views, self.states["retain"]))


@dataclass
class Follower:
    """A branch under guidance that keeps and reads what the leading branch does.

    Args:
        leader: The run of the leading branch; its pass always comes first.
    """

    leader: PolicyRun
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def moves(self) -> bool:
        """As the leader."""
        return self.leader.moves

    @property
    def opens(self) -> bool:
        """As the leader."""
        return self.leader.opens

    @property
    def columns(self) -> dict[str, str]:
        """As the leader."""
        return self.leader.columns

    @property
    def bias(self) -> str | None:
        """As the leader."""
        return self.leader.bias

    def branch(self) -> Follower:
        """Another follower of the same leader."""
        return Follower(self.leader)

    def open(self, view: CacheView) -> Retention | None:
        """The leader's answer for this layer."""
        return self.leader.said.get(("open", view.layer))

    def select(self, view: CacheView) -> Selection | None:
        """The leader's answer for this layer."""
        return self.leader.said.get(("select", view.layer))

    def times(self, view: CacheView, group: Group) -> Tensor:
        """The leader's rule: it depends on what is held, which is the same."""
        return self.leader.times(view, group)

    def commit(self, views: list[CacheView]) -> list[Retention | None] | Rebuild | None:
        """The leader's answer."""
        return self.leader.said.get("commit")

    def recode(self, views: list[CacheView]) -> list[list[Recode]]:
        """The leader's answer."""
        return self.leader.said["recode"]

    def event(
        self, event: Event, views: list[CacheView]
    ) -> list[Retention | None] | Rebuild | None:
        """The leader's answer."""
        return self.leader.said.get("event") if event.kind != "start" else None
