"""Rollouts that are watched: at each commit, what a scorer would see of the frames.

Shapes: L layers, H heads, F frames that a layer holds, K features, C context numbers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.decisions import Event, Retention
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.retain.oracle import Oracle
from lightning_kv.policies.scorer.artifact import Scorer, student_on
from lightning_kv.policies.scorer.features import Listed, forget_prompt, observe_frames
from lightning_kv.policies.scorer.running import asked, lists_of


@dataclass(frozen=True)
class Watched:
    """What was seen of one layer at a commit.

    Args:
        frames: Ids of the frames that some head holds.
        present: Which each head holds, bool ``[H, F]``.
        guard: Which are kept in any case, bool ``[H, F]``.
        listed: Features of all of them.
    """

    frames: tuple[int, ...]
    present: Tensor
    guard: Tensor
    listed: Listed


@dataclass(frozen=True)
class Decision:
    """A commit at which something had to be dropped.

    Args:
        chunk: That was committed.
        made: Frames that have been made by then.
        layers: What was seen of each.
    """

    chunk: int
    made: int
    layers: tuple[Watched, ...]


@dataclass(frozen=True)
class Taught(UnitPart):
    """Keeps what a scorer or its teacher says, and writes down what either could see.

    At each commit one of the two decides, by a draw that depends on the sample and the chunk
    (DAgger, arXiv 1011.0686): the scorer meets the memories that its own decisions lead to.

    Args:
        scorer: Whose features are written down.
        teacher: Knows the reference rollout.
        share: Of the commits, how many the teacher decides.
        decisions: Where they are written down.
    """

    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    scorer: Scorer | None = None
    teacher: Oracle = Oracle()  # noqa: RUF009  frozen
    share: float = 1.0
    decisions: list[Decision] = field(default_factory=list, compare=False, repr=False)

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
        listed = lists_of(self, todo, state, self.scorer.features)
        step = views[0].step
        seen = tuple(
            Watched(view.frames, view.present.expand(view.heads, -1), self._guard(view), own)
            for view, own in zip(todo, listed, strict=True)
        )
        self.decisions.append(Decision(step.chunk, step.final[-1] + 1, seen))
        taught = random.Random(f"{views[0].seed} taught {step.chunk}").random() < self.share
        if taught:
            state["scores"] = {view.layer: self.teacher.scores(view, state) for view in todo}
        else:
            found = asked(student_on(self.scorer, views[0].device), todo, listed)
            state["scores"] = {v.layer: x.unsqueeze(1) for v, x in zip(todo, found, strict=True)}
        return super().commit(views, state)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """What the one who decides says of each frame."""
        return state["scores"].pop(view.layer)

    def _guard(self, view: CacheView) -> Tensor:
        return self.protected(view, view.frame_ids)[:, 0].expand(view.heads, -1)
