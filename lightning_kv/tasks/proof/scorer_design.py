"""What is compared on held-out prompts: a learned scorer, its controls, and rankings by hand.

Shapes: N lists, U places of a list, K features of a frame.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.distillation.baselines import HAND_MADE, by_hand, by_scorer
from lightning_kv.distillation.clips import Collecting
from lightning_kv.distillation.collect import Taught
from lightning_kv.distillation.labels import Teacher
from lightning_kv.distillation.lists import Lists
from lightning_kv.models.samplers import stable_seed
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.scorer.artifact import Scorer, ScorerFile, check_model, shipped_scorers
from lightning_kv.policies.scorer.features import FEATURES, GROUPS
from lightning_kv.policies.scorer.students import make_student
from lightning_kv.utilities.files import checksum

JUDGED, LINEAR, UNTRAINED, SHUFFLED = "scorer", "linear", "untrained", "shuffled"
RANDOM, ORACLE = "random", "oracle"
USUAL_BUDGETS = (6, 9, 15)
USUAL_TEACHER = Teacher("mass-future")
"""Of a file that does not say what taught it; it needs no outputs, which take memory."""


@dataclass(frozen=True, eq=False)
class ScorerSource:
    """A scorer and where it comes from.

    Args:
        path: Of the file.
        scorer: What it holds.
    """

    path: Path
    scorer: Scorer

    @classmethod
    def of(cls, path: str | Path, geometry: Geometry) -> ScorerSource:
        """Find the file, and see that it is of such a model.

        Args:
            path: Of the file, or ``auto``: the one that is shipped for the model.
            geometry: Of the model.

        Raises:
            ValueError: There is none, it is damaged, or of a model of other sizes.
        """
        scorer = ScorerFile.read(path, "scorer").scorer(geometry)
        check_model(scorer, geometry, transfer=False)
        return cls(shipped_scorers()[geometry.model] if str(path) == "auto" else Path(path), scorer)

    @property
    def teacher(self) -> Teacher | None:
        """What taught it, where it says so."""
        told = self.scorer.about.get("teacher") or {}
        known = {own.name for own in fields(Teacher)}
        return Teacher(**{name: told[name] for name in told.keys() & known}) if told else None


@dataclass(frozen=True, eq=False)
class ScorerDesign:
    """The rankings of a proof, and the memories that they are judged on.

    Args:
        source: The scorer that is judged.
        linear: A linear one, taught alike.
        budgets: History frames of each head.
        geometry: Of the model.
        outputs: Whether outputs are judged too; they are where the teacher needs them.
        weights: What tells the weights of the model from others.

    Raises:
        ValueError: A budget leaves nothing to choose, or the linear one is none, or looks
            differently.
    """

    source: ScorerSource
    linear: ScorerSource | None
    budgets: tuple[int, ...]
    geometry: Geometry
    outputs: bool = True
    weights: str = ""

    def __post_init__(self) -> None:
        budgets = tuple(sorted(set(self.budgets or USUAL_BUDGETS)))
        object.__setattr__(self, "budgets", budgets)
        object.__setattr__(self, "outputs", self.outputs or "outputs" in self.teacher.needs)
        least = Taught().smallest(self.geometry.chunk)
        if wrong := [f"{own}f" for own in budgets if own <= least]:
            raise ValueError(
                f"At {', '.join(wrong)} there is nothing to choose: the newest {least} frames stay "
                f"in any case. Give budgets of {least + 1}f or more."
            )
        if self.linear is None:
            return
        own, other = self.source.scorer, self.linear.scorer
        if other.student.kind != "linear" or other.queries != own.queries:
            raise ValueError(
                f"{self.linear.path} cannot be compared with as the linear student: it is of the "
                f"kind {other.student.kind!r} and looks with {other.queries} queries a pass, where "
                f"{self.source.path} looks with {own.queries}. Give one that was distilled with "
                "--student linear and the same queries."
            )

    @property
    def teacher(self) -> Teacher:
        """What says how much frames are worth."""
        return self.source.teacher or USUAL_TEACHER

    @property
    def foreign(self) -> str:
        """What is to be said of a scorer of another model, or other weights; else nothing."""
        return self.source.scorer.foreign(self.geometry.model, self.weights)

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said of the rankings and of the file."""
        found = [
            self.foreign,
            "Rankings by hand are sums of the same features, stand-ins for the policies that they "
            f"are named after; {SHUFFLED} is the scorer with all features but age dealt to other "
            "candidates.",
        ]
        if self.source.teacher is None:
            teacher = f"{self.teacher.target}, discount {self.teacher.discount:g}, all later chunks"
            found.append(
                f"{self.source.path.name} does not say what taught it: it is judged by what is "
                f"usual ({teacher})."
            )
        if self.teacher.target not in ("mass-future", "out-future"):
            found.append(
                f"No policy decides by {self.teacher.target}, so the memories of the teacher are "
                "those of the oracle by mass."
            )
        if not self.outputs:
            found.append("Outputs were not recorded, so they are not judged.")
        return tuple(filter(None, found))

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """Tables that the reference has to record."""
        found = self.teacher.needs | self.policy(self.budgets[0], by_scorer=False).needs
        return found | ({"outputs": {"queries": self.teacher.queries}} if self.outputs else {})

    @property
    def rankings(self) -> tuple[str, ...]:
        """All that is compared, in the order of the table."""
        linear = (LINEAR,) if self.linear else ()
        return (JUDGED, *linear, UNTRAINED, SHUFFLED, *HAND_MADE, RANDOM, ORACLE)

    def policy(self, budget: int, by_scorer: bool) -> CachePolicy:
        """The memory of a rollout that is watched; what it sees is in a list of its own.

        Args:
            budget: History frames of each head.
            by_scorer: Whether the scorer decides (on-policy); else its teacher does.
        """
        share, who = (0.0, JUDGED) if by_scorer else (1.0, "teacher")
        found = Collecting(self.teacher).policy(self.source.scorer, budget, share)
        return replace(found, name=f"{who}@{budget}f")

    def scores(self, lists: Lists, key: str) -> dict[str, Tensor]:
        """What each ranking says of lists with all features, ``[N, U]``: more is kept longer.

        Args:
            lists: Of one clip at one budget.
            key: Of these lists; what is drawn at random depends on it.
        """
        generator = torch.Generator().manual_seed(stable_seed("prove scorer", key))
        noise, lucky = torch.rand(2, *lists.candidate.shape, generator=generator)
        found = {
            JUDGED: by_scorer(lists, self.source.scorer),
            UNTRAINED: by_scorer(lists, self._untrained),
            SHUFFLED: by_scorer(dealt(lists, noise), self.source.scorer),
            RANDOM: lucky,
            ORACLE: lists.target,
        }
        found |= {name: by_hand(lists, own) for name, own in HAND_MADE.items()}
        if self.linear:
            found[LINEAR] = by_scorer(lists, self.linear.scorer)
        return {name: found[name] for name in self.rankings}

    @cached_property
    def _untrained(self) -> Scorer:
        """The scorer as it was before it was taught."""
        student = make_student(**self.source.scorer.student.settings)
        return replace(self.source.scorer, student=student.eval().requires_grad_(False))

    def describe(self) -> dict[str, Any]:
        """What the records depend on."""
        return {
            "scorer": checksum(self.source.path),
            "linear": self.linear and checksum(self.linear.path),
            "teacher": asdict(self.teacher),
            "budgets": list(self.budgets),
            "outputs": self.outputs,
        }


def dealt(lists: Lists, noise: Tensor) -> Lists:
    """Lists in which all features but those of age are dealt to other candidates.

    What a scorer can still tell from these is a matter of age.

    Args:
        lists: With all features; candidates first, as they are in all lists of clips.
        noise: ``[N, U]``: says to whom.
    """
    order = noise.masked_fill(~lists.candidate, torch.inf).argsort(dim=-1)
    spread = order.unsqueeze(-1).expand_as(lists.features)
    age = torch.tensor([name in GROUPS["age"] for name in FEATURES], device=noise.device)
    return replace(
        lists, features=torch.where(age, lists.features, lists.features.gather(1, spread))
    )
