"""A cache policy is five answers: retain, select, budget, positions, precision.

Shapes: H heads (or 1 where all agree), Q query frames (or 1), U units (F frames, or N rows).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.codecs import CODECS
from lightning_kv.cache.decisions import Rebuild, Recode, Retention, Selection
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rows import FIELDS, ROW_BYTES
from lightning_kv.cache.store import REDUCERS
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.budget.uniform import Uniform
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.cache_spec import CacheSpec
from lightning_kv.policies.checks import choice
from lightning_kv.policies.part import PARTS, Part, State
from lightning_kv.policies.scored import ScoredPart

ENDLESS = 10**9  # frames


@dataclass(frozen=True)
class RetainPart(ScoredPart):
    """What stays in memory. By default: the units with the highest score."""

    kind: ClassVar[str] = "retain"
    moments: ClassVar[tuple[str, ...]] = ("commit",)
    """When it is asked: ``commit`` (after the commit pass, all layers together), ``open`` (in the
    first pass of a chunk) or ``closing`` (in the commit pass, whose attention reads the result),
    the latter two layer by layer, before attention, with the queries at hand. Between a commit and
    the next ``open`` the newest chunk is still the current one, which no budget counts."""

    @property
    def layered(self) -> bool:
        """In the middle of a pass it is."""
        return "commit" not in self.moments

    def commit(
        self, views: list[CacheView], state: State
    ) -> list[Retention | None] | Rebuild | tuple[list[Retention | None], Rebuild] | None:
        """One decision per layer, or a rebuild, or both; nothing where None."""
        pairs = zip(views, self.choose(views, state), strict=True)
        return [self.kept(view, units, state) for view, units in pairs]

    def open(self, view: PassView, state: State) -> Retention | None:
        """The decision for one layer in the first pass of a chunk."""
        return self.keep(view, state)

    def closing(self, view: PassView, state: State) -> Retention | None:
        """The decision for one layer in the commit pass."""
        return self.keep(view, state)

    def keep(self, view: CacheView, state: State) -> Retention | None:
        """The decision for one layer."""
        return self.kept(view, self.choose([view], state)[0], state)

    def kept(self, view: CacheView, units: Tensor | None, state: State) -> Retention | None:
        """The retention that keeps units ``[1 or H, 1, U]``."""
        if units is None:
            return None
        return Retention(keep=view.rows_of(units[:, 0]) if self.unit == "frame" else units[:, 0])


@dataclass(frozen=True)
class UnitPart(RetainPart):
    """Keep some frames, or some single rows, and always the newest chunk.

    Args:
        granularity: Keep or drop whole ``frame``s, or single ``token``s of any frame.
        sink: First frames of the video that are never dropped; they count in the budget.
    """

    granularity: str = "frame"
    sink: int = 0

    def __post_init__(self) -> None:
        choice(self, granularity=("frame", "token"))
        if self.sink < 0:
            raise ValueError(
                f"sink={self.sink} of the retain part {self.name!r} is out of range. It must be 0 "
                "or more."
            )

    @property
    def unit(self) -> str:
        """As set."""
        return self.granularity

    def smallest(self, chunk: int) -> int:
        """The sink and the newest chunk."""
        return self.sink + chunk

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The sink and the newest chunk."""
        frames = self.unit == "frame"
        ids = view.frame_ids.view(1, 1, -1) if frames else view.frame_id.unsqueeze(1)
        return (ids < self.sink) | (ids >= newest(view))


def newest(view: CacheView) -> int:
    """First frame of the newest chunk that has become final."""
    step = view.step
    return step.final[0] if step.final else step.start - (view.geometry.chunk or view.query_frames)


@dataclass(frozen=True)
class SelectPart(ScoredPart):
    """What the queries of a pass read. By default: the frames with the highest score.

    Args:
        refresh: Choose in every ``pass``, or once per ``chunk`` (in its first pass, and again where
            a pass has other frames in flight or memory has changed).
    """

    kind: ClassVar[str] = "select"
    waits: ClassVar[bool] = False
    """Whatever its budget, only the device knows how much it reads: each plan waits for that."""
    refresh: str = "chunk"

    def __post_init__(self) -> None:
        if self.refresh not in ("pass", "chunk"):
            raise ValueError(f"refresh={self.refresh!r} is neither 'pass' nor 'chunk'.")

    @property
    def layered(self) -> bool:
        """In a pass it is."""
        return True

    def pick(self, view: PassView, state: State) -> Selection | None:
        """The selection of one layer; everything where None."""
        units = self.choose([view], state)[0]
        if units is None:
            return None
        if self.unit == "token":
            return Selection(rows=units)
        return Selection(frames=units, count=self.count(view))


@dataclass(frozen=True)
class PositionsPart(Part, ABC):
    """At which rotary time a held row appears; queries stay where they are."""

    kind: ClassVar[str] = "positions"
    moves: ClassVar[bool] = True
    depends: ClassVar[bool] = False
    """Asked once more when it is known what is read."""

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """Refuse a model that the part is not made for."""
        return

    @abstractmethod
    def lags(self, view: CacheView, state: State, selection: Selection | None = None) -> Tensor:
        """Frames between each row and the start of the oldest chunk in flight, or the query itself.

        Args:
            view: Of one layer.
            state: This part's.
            selection: What is read, for parts that ``depend`` on it.

        Returns:
            ``[1 or H, 1, N]`` against the start, or ``[1 or H, Q, N]`` against each query frame;
            may be fractional.
        """
        ...


@dataclass(frozen=True)
class PrecisionPart(Part):
    """Which rows get which codec."""

    kind: ClassVar[str] = "precision"
    codes: ClassVar[bool] = True

    def assign(self, view: CacheView, state: State) -> list[Recode]:
        """Rows of one layer to store with a codec, asked after each retention."""
        return []

    @property
    def raw(self) -> bool:
        """Whether keys are stored before rotation, because the codec wants them so."""
        codec, _ = self.ends_in()
        return codec is not None and CODECS[codec].raw

    def ends_in(self) -> tuple[str | None, int | None]:
        """The codec in which rows end, and after how many frames; None: after a chunk."""
        return None, 0

    def row_bytes(self, geometry: Geometry) -> tuple[float, int]:
        """Bytes of a row and head in the codec it ends in, fields included, and the age for it."""
        codec, age = self.ends_in()
        width, element, chunk = geometry.head_dim, geometry.element_size, max(1, geometry.chunk)
        plain = 2.0 * width * element
        if codec is not None:  # rows of a chunk age together
            plain = CODECS[codec].row_bytes(width, element, chunk * geometry.tokens)
        return plain + ROW_BYTES, chunk if age is None else age


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
        for part in (self.retain, self.select):
            if part.budget is not None and (own := part.budget.of(part)) is not part.budget:
                object.__setattr__(self, part.kind, replace(part, budget=own))

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
        """Tables the parts ask for, by name, with their settings.

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

    @property
    def inputs(self) -> tuple[str, ...]:
        """Side inputs by frame that the parts ask for, by name."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.inputs))

    def budgeted(self, amount: str, name: str | None = None) -> CachePolicy:
        """The same policy with another budget.

        Args:
            amount: ``9f``; or ``15f/9f`` for a policy with two budgets, memory and reads. One
                amount alone sets its memory, and leaves reads the same share of it.
            name: Of the new policy.

        Raises:
            ValueError: It has no budget, or fewer than there are amounts.
        """
        parts = {kind: getattr(self, kind) for kind in ("retain", "select")}
        mine = {kind: part for kind, part in parts.items() if part.budget is not None}
        if not mine:  # none is set yet
            mine = {
                kind: replace(part, budget=Uniform())
                for kind, part in parts.items()
                if part.limited
            }
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
        """Refuse parts, or a budget, that cannot work in a rollout of so many frames.

        Raises:
            ValueError: Too small for what the part protects, or larger than the history; or parts
                contradict each other.
        """
        for part in self.parts:
            part.suits(self)
        history = frames - chunk if self.asked else ENDLESS
        self.positions.check(geometry, chunk, frames)
        for part in (self.retain, self.select):
            part.check(geometry, chunk, frames)
            if part.budget is not None:
                self._check_budget(part)
                part.budget.check(geometry, part.smallest(chunk))
                own = CacheSpec.of_policy(self, part)
                part.budget.check_cache(geometry, own, frames - chunk)
                amount = Amount.parse(part.budget.amount)
                if amount.unit == "B" and part.kind == "select":
                    raise ValueError(
                        f"The budget {part.budget.amount} of {self.name!r} is bytes, but reading "
                        "less frees none. Give frames, tokens or a share, or put it on `retain`."
                    )
                least = part.smallest(chunk)
                row = self.precision.row_bytes(geometry)
                amount.check(self.name, least, history, chunk, geometry, row)

    def _check_budget(self, part: ScoredPart) -> None:
        """Refuse a budget that wants to know what its part cannot tell."""
        budget, where = part.budget, f"the {part.kind} part {part.name!r} in {self.name!r}"
        if budget.compares and not part.comparable:
            fits = [name for name, cls in PARTS["budget"].items() if not cls.compares]
            raise ValueError(
                f"The budget part {budget.name!r} compares scores between heads, and those of "
                f"{where} only rank within one. Give it the budget part {' or '.join(fits)}, or "
                "another score."
            )
        if budget.gathers and part.layered:
            raise ValueError(
                f"The budget part {budget.name!r} divides among the heads of all layers, and "
                f"{where} decides layer by layer. Use over: layer, or a retain part that decides "
                "at a commit."
            )
