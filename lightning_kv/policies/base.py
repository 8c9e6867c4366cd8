"""A cache policy is five answers: retain, select, budget, positions, precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild, Recode, Retention, Selection
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rows import FIELDS, Group
from lightning_kv.cache.store import REDUCERS
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.amount import Amount
from lightning_kv.policies.run import PolicyRun
from lightning_kv.policies.scores import top_frames

ENDLESS = 10**9  # frames
KINDS = ("retain", "select", "budget", "positions", "precision")


class Part:
    """One answer. Parts are frozen dataclasses: their ``repr`` is their configuration.

    A part keeps nothing between calls; what it must remember is the object that :meth:`fresh`
    makes, for each rollout and sample.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    columns: ClassVar[dict[str, str]] = {}
    registry: ClassVar[dict[str, dict[str, type[Part]]]] = {kind: {} for kind in KINDS}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            Part.registry[cls.kind][cls.name] = cls

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """Statistics to collect for this part, by name, each with its settings."""
        return {}

    @classmethod
    def prepared(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings as people write them, made into those of the dataclass (files are read)."""
        return settings

    def fresh(self) -> Any:
        """State of one sample in one rollout: any object; its tensors count as cache bytes."""
        return {}


@dataclass(frozen=True)
class BudgetPart(Part, ABC):
    """How many frames each head may keep or read.

    Args:
        amount: History frames, the protected ones included: ``9f``, ``9360t`` (tokens), ``0.25``
            (of the history the reference holds), ``2GiB`` (whole cache of one clip).
    """

    kind: ClassVar[str] = "budget"
    amount: str = "9f"

    def __post_init__(self) -> None:
        Amount.parse(self.amount)

    def frames(self, view: CacheView) -> float:
        """The amount in frames per head, in this pass."""
        return Amount.parse(self.amount).frames(view)

    def fewest(self, view: CacheView) -> float:
        """Frames that every head may hold whatever the scores; below that nothing is scored."""
        return 0.0

    def check(self, geometry: Geometry, least: int) -> None:
        """Refuse a budget of another model, or below ``least`` frames for some head."""
        return

    @abstractmethod
    def lengths(self, score: Tensor, view: CacheView) -> Tensor:
        """Frames for each stream, int64 ``[H, Q]`` or ``[H, 1]``, given scores ``[H, Q, F]``."""
        ...


@dataclass(frozen=True)
class ScoredPart(Part):
    """The flow that scoring parts share: scores, budget, lengths, top-k around a protected mask.

    Args:
        budget: How much; everything where None.
    """

    budget: BudgetPart | None = None

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """Higher stays longer: ``[H, Q, F]`` over the view's frames (Q may be 1).

        By default the newest frames score highest.
        """
        return view.frame_ids.double().expand(view.heads, 1, -1)

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """Frames that stay whatever the others score, bool broadcast to ``[H, Q, F]``."""
        return torch.zeros_like(view.frame_ids, dtype=torch.bool).view(1, 1, -1)

    def smallest(self, chunk: int) -> int:
        """Fewest frames a budget must hold for this part to work, given frames per chunk."""
        return 1

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """Refuse settings that make no sense for a model and a rollout of so many frames."""
        return

    def choose(self, view: CacheView, state: Any) -> Tensor | None:
        """Frames to keep or read, bool ``[H, Q, F]``; None where everything fits."""
        if self.budget is None or not len(view.frame_ids):
            return None
        size = view.rows_per_frame.unsqueeze(1) / view.geometry.tokens
        total = size.sum(-1)
        if float(total.max()) <= self.budget.fewest(view):
            return None  # nothing to decide, so nothing is scored
        scores = self.scores(view, state)
        lengths = self.budget.lengths(scores, view)
        if bool((lengths >= total).all()):
            return None
        protected = self.protected(view, scores).expand_as(scores) & (size > 0)
        return top_frames(scores, lengths, protected, size.expand_as(scores))


@dataclass(frozen=True)
class RetainPart(ScoredPart):
    """What stays in memory. By default: the frames with the highest score.

    ``when`` is ``commit`` (after the commit pass, all layers together) or ``open`` (in the first
    pass of a chunk, layer by layer, with the queries at hand).
    """

    kind: ClassVar[str] = "retain"
    when: ClassVar[str] = "commit"

    def suits(self, bias: str | None) -> None:
        """Refuse the policy's bias where it contradicts what this part does."""
        return

    def decide(self, views: list[CacheView], state: Any) -> list[Retention | None] | Rebuild | None:
        """One decision per layer (``when="open"`` asks with one view at a time)."""
        return [self._keep(view, state) for view in views]

    def event(
        self, event: Event, views: list[CacheView], state: Any
    ) -> list[Retention | None] | Rebuild | None:
        """The answer to an event; nothing by default."""
        return None

    def _keep(self, view: CacheView, state: Any) -> Retention | None:
        frames = self.choose(view, state)
        return None if frames is None else Retention(keep=view.rows_of(frames[:, 0]))


@dataclass(frozen=True)
class SelectPart(ScoredPart):
    """What the queries of a pass read. By default: the frames with the highest score.

    Args:
        refresh: Choose in every ``pass``, or once per ``chunk`` (in its first pass, and again where
            a pass has other frames in flight).
    """

    kind: ClassVar[str] = "select"
    refresh: str = "pass"

    def __post_init__(self) -> None:
        if self.refresh not in ("pass", "chunk"):
            raise ValueError(f"refresh={self.refresh!r} is neither 'pass' nor 'chunk'.")

    def pick(self, view: CacheView, state: Any) -> Selection | None:
        """The selection of one pass and layer; everything where None."""
        flight, found = state.get(view.layer, ((), None))
        if self.refresh == "chunk" and not view.step.opens and flight == view.step.frames:
            return found
        frames = self.choose(view, state)
        found = None if frames is None else Selection(frames=frames)
        if self.refresh == "chunk":
            state[view.layer] = (view.step.frames, found)
        return found


@dataclass(frozen=True)
class PositionsPart(Part, ABC):
    """At which rotary time a held row appears."""

    kind: ClassVar[str] = "positions"
    moves: ClassVar[bool] = True

    @abstractmethod
    def times(self, view: CacheView, group: Group, state: Any) -> Tensor:
        """Rotary times ``[1 or h, N]`` of a group's rows; the queries stay where they are."""
        ...


@dataclass(frozen=True)
class PrecisionPart(Part, ABC):
    """Which rows get which codec."""

    kind: ClassVar[str] = "precision"

    @abstractmethod
    def assign(self, view: CacheView, state: Any) -> list[Recode]:
        """Rows of one layer to store with a codec, asked after each retention."""
        ...


@dataclass(frozen=True)
class CachePolicy:
    """One choice for each part.

    Args:
        name: The key in results.
        retain: What stays in memory.
        select: What is read.
        positions: Where held rows appear.
        precision: How rows are stored.
        bias: ``log_weight`` lets a merged row count for the tokens it stands for.
        branches: Under guidance, ``each`` branch decides for itself, or the decisions of the
            prompt's branch are ``shared``.
        asked: Somebody asked for these budgets; those that a preset brings along may exceed the
            history of a short rollout.
    """

    name: str
    retain: RetainPart
    select: SelectPart
    positions: PositionsPart
    precision: PrecisionPart
    bias: str | None = None
    branches: str = "each"
    asked: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        if self.bias not in (None, "log_weight"):
            raise ValueError(f"bias={self.bias!r} of policy {self.name!r}: use log_weight or none.")
        if self.branches not in ("each", "shared"):
            raise ValueError(
                f"branches={self.branches!r} of policy {self.name!r}: use each or shared."
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part, budgets included."""
        own = (self.retain, self.select, self.positions, self.precision)
        return (*own, *(p.budget for p in own if isinstance(p, ScoredPart) and p.budget))

    @property
    def columns(self) -> dict[str, str]:
        """Row columns that the parts declare, with their reducers.

        Raises:
            ValueError: Two parts want different reducers, or a name or reducer is not allowed.
        """
        found: dict[str, str] = {}
        for part in self.parts:
            for name, how in part.columns.items():
                if name in FIELDS or how not in REDUCERS or found.get(name, how) != how:
                    raise ValueError(
                        f"The column {name!r} ({how}) of the part {part.name!r} in {self.name!r} "
                        f"does not work: columns so far are {found}. Names other than "
                        f"{', '.join(FIELDS)}, and one of {', '.join(REDUCERS)}, would."
                    )
                found[name] = how
        return found

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """Statistics the parts ask for, by name, with their settings.

        Raises:
            ValueError: Two parts want one statistic with different settings.
        """
        found: dict[str, dict[str, Any]] = {}
        for part in self.parts:
            for name, how in part.needs.items():
                if found.setdefault(name, how) != how:
                    raise ValueError(
                        f"Two parts of {self.name!r} want {name!r} with other settings: "
                        f"{found[name]} and {how}. Give both the same."
                    )
        return found

    def budgeted(self, amount: str, name: str | None = None) -> CachePolicy:
        """The same policy with another budget.

        Args:
            amount: ``9f``; or ``15f/9f`` for a policy with two budgets, memory and reads. One
                amount alone sets its memory, and leaves reads the same share of it.
            name: Of the new policy.

        Raises:
            ValueError: It has no budget, or fewer than there are amounts.
        """
        mine = {kind: getattr(self, kind) for kind in ("retain", "select")}
        mine = {kind: part for kind, part in mine.items() if part.budget is not None}
        amounts = amount.split("/")
        if len(amounts) == 1 and len(mine) == 2:
            old = [Amount.parse(part.budget.amount) for part in mine.values()]
            amounts.append(Amount.parse(amount).scaled(old[1].over(old[0])))
        if len(amounts) != len(mine):
            has = {0: "no budget", 1: "one budget", 2: "two budgets"}[len(mine)]
            way = {0: self.name, 1: f"{self.name}@9f", 2: f"{self.name}@15f/9f"}[len(mine)]
            raise ValueError(
                f"The policy {self.name!r} has {has}, so {self.name}@{amount} means nothing. "
                f"Write {way!r}."
            )
        changed = {
            kind: replace(part, budget=replace(part.budget, amount=text))
            for (kind, part), text in zip(mine.items(), amounts, strict=True)
        }
        return replace(self, name=name or self.name, asked=True, **changed)

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """Refuse a budget that cannot work in a rollout of so many frames.

        Raises:
            ValueError: Too small for what the part protects, or larger than the history.
        """
        self.retain.suits(self.bias)
        history = frames - chunk if self.asked else ENDLESS
        for part in (self.retain, self.select):
            part.check(geometry, chunk, frames)
            if part.budget is not None:
                part.budget.check(geometry, part.smallest(chunk))
                amount = Amount.parse(part.budget.amount)
                if amount.unit == "B" and part.kind == "select":
                    raise ValueError(
                        f"The budget {part.budget.amount} of {self.name!r} is bytes, but reading "
                        "less frees none. Give frames, tokens or a share, or put it on `retain`."
                    )
                least = part.smallest(chunk)
                amount.check(self.name, least, history, chunk, geometry)

    def start(self) -> PolicyRun:
        """This policy at work on one sample."""
        return PolicyRun(self)
