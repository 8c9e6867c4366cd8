"""Rollouts that are watched: at each commit, what a scorer would see of the frames.

Shapes: L layers, H heads, F frames that a layer holds, K features, C context numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.decisions import Event, Retention
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.distillation.labels import Decision
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.hindsight import Place
from lightning_kv.policies.retain.oracle import Oracle
from lightning_kv.policies.scorer.artifact import Scorer, student_on
from lightning_kv.policies.scorer.features import FEATURES, Listed, forget_prompt, observe_frames
from lightning_kv.policies.scorer.running import asked, budget_of, lists_of


@dataclass(frozen=True, eq=False)
class Watched:
    """A commit at which something had to be dropped, and what a scorer would see there.

    Args:
        decision: What there was to choose from.
        listed: Features of the frames of each of its places.
        budget: History frames that each head may keep, ``[1 or H]`` of each place.
    """

    decision: Decision
    listed: tuple[Listed, ...]
    budget: tuple[Tensor, ...]


@dataclass(frozen=True)
class Taught(UnitPart):
    """Keeps what a scorer or its teacher says, and writes down what either could see.

    At each commit one of the two decides, by a draw that depends on the sample and the chunk
    (DAgger, arXiv 1011.0686): the scorer meets the memories that its own decisions lead to.

    Args:
        scorer: Decides, where the teacher does not.
        teacher: Knows the reference rollout.
        share: Of the commits, how many the teacher decides.
        watched: Where what is seen is written down: all features that there are.
    """

    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    scorer: Scorer | None = None
    teacher: Oracle = Oracle()  # noqa: RUF009  frozen
    share: float = 1.0
    watched: list[Watched] = field(default_factory=list, compare=False, repr=False)

    @property
    def comparable(self) -> bool:
        """Ranks within a head are all there is."""
        return False

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """Those of the teacher, where it decides."""
        return self.teacher.needs if self.share else {}

    def observe(self, view: PassView, state: Any) -> None:
        """What the frames that become final look at."""
        observe_frames(view, state, self.scorer.queries)

    def event(self, event: Event, views: list[CacheView], state: Any) -> None:
        """A prompt switch forgets the queries of the old prompt."""
        if event.kind == "prompt_switch":
            forget_prompt(state)

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Write down what is seen, and let one of the two decide."""
        todo = [view for view in views if not self.fits(view)]
        if not todo:
            return [None] * len(views)
        listed = lists_of(self, todo, state, tuple(FEATURES))
        guards = tuple(self.protected(view, view.frame_ids)[:, 0] for view in todo)
        decision = Decision(views[0].step.chunk, tuple(map(Place.of, todo)), guards)
        budgets = tuple(budget_of(self, view) for view in todo)
        self.watched.append(Watched(decision, tuple(listed), budgets))
        taught = (
            random.Random(f"{views[0].seed} taught {views[0].step.chunk}").random() < self.share
        )
        if taught:
            state["scores"] = {view.layer: self.teacher.scores(view, state) for view in todo}
        else:
            own = [_of_features(x, self.scorer.features) for x in listed]
            found = asked(student_on(self.scorer, views[0].device), todo, own)
            state["scores"] = {v.layer: x.unsqueeze(1) for v, x in zip(todo, found, strict=True)}
        return super().commit(views, state)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """What the one who decides says of each frame."""
        return state["scores"].pop(view.layer)


def _of_features(listed: Listed, names: Sequence[str]) -> Listed:
    """Some of all features."""
    every = list(FEATURES)
    return replace(listed, features=listed.features[..., [every.index(name) for name in names]])
