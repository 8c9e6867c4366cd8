"""The flow that scoring parts share: scores, budget, lengths, top-k around a protected mask.

Shapes: H heads (or 1 where all agree), Q query frames (or 1), U units (F frames, or N rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.checks import named
from lightning_kv.cache.host import upload
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.part import BudgetPart, Part, State

ROUNDING = 1e-6  # of a row


@dataclass(frozen=True)
class ScoredPart(Part):
    """The flow that scoring parts share: scores, budget, lengths, top-k around a protected mask.

    What is ranked is a unit: a frame (U = F) or a row of the table (U = N).

    Args:
        budget: How much; everything where None.
    """

    limited: ClassVar[bool] = True
    """Whether it takes a budget."""

    @property
    def comparable(self) -> bool:
        """Whether scores of different heads can be compared, as softmax mass can."""
        return True

    @property
    def layered(self) -> bool:
        """Whether it is asked layer by layer, so that no budget can look at all of them."""
        return False

    budget: BudgetPart | None = None

    @property
    def unit(self) -> str:
        """``frame`` or ``token``."""
        return "frame"

    def scores(self, view: CacheView, state: State) -> Tensor:
        """Higher stays longer: ``[1 or H, 1 or Q, U]``. By default the newest score highest."""
        own = view.frame_ids.view(1, 1, -1) if self.unit == "frame" else view.frame_id.unsqueeze(1)
        return own.double()

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """Units that stay whatever the others score, bool broadcast to those of ``scores``."""
        return torch.zeros(1, 1, 1, dtype=torch.bool, device=view.device)

    def smallest(self, chunk: int) -> int:
        """The most frames that are protected: a budget must hold as many, and one at least."""
        return 1

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """Refuse settings that make no sense for a model and a rollout of so many frames."""
        return

    def sizes(self, view: CacheView) -> Tensor:
        """Rows of each unit, int64 ``[1 or H, 1, U]``."""
        own = view.rows_per_frame if self.unit == "frame" else view.valid.long()
        return own.unsqueeze(1)

    def rows(self, view: CacheView) -> tuple[int, ...] | None:
        """Rows that each head (one number: all) may have, where the host knows; else None."""
        allowed, tokens = self.budget.allowed(view), view.geometry.tokens
        if allowed is None:
            return None
        least = self.smallest(view.geometry.chunk or view.query_frames)
        if Amount.parse(self.budget.amount).unit == "B" and min(allowed) < least:
            raise ValueError(
                f"{named(self, view)} has a budget of {self.budget.amount}, of which "
                f"{min(allowed):g} frames are left beside the frames in flight and "
                f"{view.fixed_bytes} fixed bytes (state and archive); {least} are protected. "
                "Give more bytes."
            )
        if self.unit == "frame":
            return tuple(math.floor(frames + ROUNDING) * tokens for frames in allowed)
        return tuple(math.floor(frames * tokens + ROUNDING) for frames in allowed)

    def evenly(self, otherwise: str = "") -> None:
        """Refuse budgets that give heads different amounts: this part decides for all together.

        Args:
            otherwise: What would work beside an even budget.
        """
        if self.budget is not None and self.budget.name != "uniform":
            raise ValueError(
                f"The {self.kind} part {self.name!r} decides for all heads of a layer together, "
                f"and the budget part {self.budget.name!r} gives heads different amounts. Use a "
                f"uniform budget, such as 9f{otherwise and f', or {otherwise}'}."
            )

    def most(self, view: CacheView) -> int:
        """Units that any head may have; all where that depends on scores."""
        rows, units = self.rows(view), len(view.frames) if self.unit == "frame" else len(view)
        if rows is None:
            return units
        return min(units, max(rows) // (view.geometry.tokens if self.unit == "frame" else 1))

    def fits(self, view: CacheView) -> bool:
        """Whether there is nothing to decide, so that nothing need be scored."""
        if self.budget is None or not len(view):
            return True
        rows = self.rows(view)
        if rows is None:
            return False
        wide = rows * (view.heads // len(rows))
        return all(own <= most for own, most in zip(view.lengths, wide, strict=True))

    def choose(self, views: Sequence[CacheView], state: State) -> list[Tensor | None]:
        """Units to keep or read in each view, bool ``[1 or H, 1 or Q, U]``; None for all."""
        todo = [view for view in views if not self.fits(view)]
        scores = [self.scored(view, self.scores(view, state)) for view in todo]
        chosen = dict(zip(map(id, todo), self.best(todo, scores, state), strict=True))
        return [chosen.get(id(view)) for view in views]

    def scored(self, view: CacheView, scores: Tensor) -> Tensor:
        """The scores, if they are numbers of the right shape.

        Raises:
            ValueError: They are not. NaN is found on the device, and raised when the host reads.
        """
        units = len(view.frames) if self.unit == "frame" else len(view)
        shape = ((1, view.heads), (1, view.query_frames), (units,))
        fits = scores.ndim == 3 and scores.is_floating_point()
        if not fits or any(n not in s for n, s in zip(scores.shape, shape, strict=True)):
            raise ValueError(
                f"{named(self, view)} gave scores {scores.dtype} {tuple(scores.shape)}. Give "
                f"floats of 1 or {view.heads} x 1 or {view.query_frames} x {units}."
            )
        view.doubt(scores.isnan().any(), f"{named(self, view)} gave scores with NaN.")
        return scores

    def best(
        self, views: Sequence[CacheView], scores: Sequence[Tensor], state: State
    ) -> list[Tensor]:
        """The units with the highest scores, as far as the budget goes."""
        if not views:
            return []
        sizes = [self.sizes(view) for view in views]
        guard = [
            self.protected(v, s) & (z > 0) for v, s, z in zip(views, scores, sizes, strict=True)
        ]
        rows = [self.rows(view) for view in views]
        if rows[0] is None:
            own = state.get("budget", {})
            lengths = self.budget.lengths(views, scores, sizes, guard, own)
        else:
            pairs = zip(rows, views, strict=True)
            lengths = [upload(r, v._like, torch.int64).unsqueeze(1) for r, v in pairs]
        if Amount.parse(self.budget.amount).unit in "ft":  # a share is small at first
            for view, own, size, most in zip(views, guard, sizes, lengths, strict=True):
                view.doubt(
                    ((own * size).sum(-1) > most).any(),
                    f"{named(self, view)} protects more than its budget {self.budget.amount} "
                    "allows. Give a larger budget, or say so in `smallest`.",
                )
        parts = zip(scores, lengths, guard, sizes, strict=True)
        return [top_units(*part) for part in parts]

    def count(self, view: CacheView) -> int | tuple[int, ...] | None:
        """Frames that each stream gets, where the host knows it beforehand."""
        rows = self.rows(view)
        if rows is None or self.unit != "frame" or not view.whole:
            return None
        tokens, chunk = view.geometry.tokens, view.geometry.chunk or view.query_frames
        if min(rows) < self.smallest(chunk) * tokens:
            return None
        frames = [own // tokens for own in rows * (view.heads // len(rows))]
        held = [own // tokens for own in view.lengths]
        each = tuple(min(a, b) for a, b in zip(frames, held, strict=True))
        return each[0] if len(set(each)) == 1 else each


def top_units(score: Tensor, lengths: Tensor, protected: Tensor, size: Tensor) -> Tensor:
    """The best units of each stream as far as a length goes; protected ones first.

    Units are taken in the order of their scores, ties to the earlier, until the next one would
    exceed the length.

    Args:
        score: ``[1 or H, 1 or Q, U]``.
        lengths: int64 ``[1 or H, 1 or Q]`` rows, protected units included.
        protected: bool, broadcast to the scores; they are chosen whatever the length.
        size: int64, broadcast: rows of each unit; those without any are never chosen.

    Returns:
        bool ``[1 or H, 1 or Q, U]``.
    """
    lines = [max(a, b, c) for a, b, c in zip(score.shape, size.shape, protected.shape, strict=True)]
    lines[:2] = [max(a, b) for a, b in zip(lines, lengths.shape, strict=False)]
    present, size = (size > 0).expand(lines), size.expand(lines)
    protected = protected.expand(lines) & present
    key = score.double().expand(lines)
    key = key.masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    taken = size.gather(-1, order).cumsum(-1) <= lengths.unsqueeze(-1)
    return (torch.zeros_like(present).scatter(-1, order, taken) & present) | protected
