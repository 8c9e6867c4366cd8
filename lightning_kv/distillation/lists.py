"""Decisions that a scorer is taught and judged by: the candidate frames of a head at one commit.

Shapes: N lists, U places of a list, K features of a frame, C numbers of the whole list, R queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

FLAT = 1e-6  # a deviation below this share of the largest value is rounding
SHAPES = {
    "features": "NUK",
    "context": "NC",
    "candidate": "NU",
    "target": "NU",
    "layer": "N",
    "head": "N",
    "clip": "N",
    "weight": "N",
    "keep": "N",
    "share": "NRV",
    "gram": "NRVV",
    "query": "NR",
}
KINDS = {"candidate": torch.bool} | dict.fromkeys(("layer", "head", "clip", "keep"), torch.int64)
OUTPUTS = ("share", "gram", "query")


@dataclass(frozen=True, eq=False)
class Lists:
    """What could be kept in some decisions, and what it would have been worth.

    Places go from the oldest frame to the newest; the padding of short lists comes last.

    Args:
        features: ``[N, U, K]``, as they were measured.
        context: ``[N, C]``, numbers of the whole list.
        candidate: bool ``[N, U]``: frames that may be kept or dropped. Protected ones are not in a
            list.
        target: ``[N, U]``, 0 or more: what keeping a frame is worth.
        layer: int64 ``[N]``.
        head: int64 ``[N]``.
        clip: int64 ``[N]``: the clip that each decision was made in.
        weight: ``[N]``: what each list counts.
        keep: int64 ``[N]``: how many candidates the budget of the rollout lets a head keep.
        share: ``[N, R, U + 1]``: of some later queries, the softmax share p of each place, and
            last of all that is read in any case; None where outputs were not recorded.
        gram: ``[N, R, U + 1, U + 1]``: scalar products of the pulls p (o - a) with each other,
            where a is the output and o that of a frame alone (:mod:`lightning_kv.cache.outputs`).
        query: ``[N, R]``: what each of these queries counts.

    Raises:
        ValueError: Shapes or kinds of number do not fit together.
    """

    features: Tensor
    context: Tensor
    candidate: Tensor
    target: Tensor
    layer: Tensor
    head: Tensor
    clip: Tensor
    weight: Tensor
    keep: Tensor
    share: Tensor | None = None
    gram: Tensor | None = None
    query: Tensor | None = None

    def __post_init__(self) -> None:
        present = [name for name in OUTPUTS if getattr(self, name) is not None]
        if present and len(present) < len(OUTPUTS):
            raise ValueError(
                f"Lists were given {' and '.join(present)} alone. Give share, gram and query "
                "together, or none of them."
            )
        sizes = {"N": len(self.candidate), "U": self.candidate.shape[-1]}
        sizes["V"] = sizes["U"] + 1
        for name, axes in SHAPES.items():
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            kind = KINDS.get(name, torch.float32)
            known = dict(zip(axes, value.shape, strict=False)) | sizes
            shape = tuple(known.get(axis, axis) for axis in axes)
            if value.dtype != kind or tuple(value.shape) != shape:
                raise ValueError(
                    f"Lists were given {name} as {value.dtype} {tuple(value.shape)}. With "
                    f"{sizes['N']} lists of {sizes['U']} places it must be {kind} {shape}."
                )
            sizes = known

    def __len__(self) -> int:
        return len(self.candidate)

    @property
    def places(self) -> int:
        """Of each list, U."""
        return self.candidate.shape[1]

    @property
    def width(self) -> tuple[int, int, int]:
        """Features of a frame K, of a list C, and queries R (0 without outputs)."""
        queries = 0 if self.query is None else self.query.shape[1]
        return self.features.shape[2], self.context.shape[1], queries

    def select(self, index: Tensor | slice) -> Lists:
        """Some of the lists: by their numbers, by a mask over them, or a run of them."""
        return Lists(**{name: value[index] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> Lists:
        """The same on another device; how Lightning moves a batch, too."""
        return Lists(**{name: value.to(device) for name, value in self._tensors().items()})

    def padded(self, places: int) -> Lists:
        """The same with so many places.

        Raises:
            ValueError: There are more already.
        """
        more = places - self.places
        if more < 0:
            raise ValueError(
                f"Lists of {self.places} places cannot be padded to {places}. Give "
                f"{self.places} or more."
            )
        found = self._tensors()
        found["features"] = F.pad(self.features, (0, 0, 0, more))
        found["candidate"] = F.pad(self.candidate, (0, more))
        found["target"] = F.pad(self.target, (0, more))
        if self.share is not None and more:  # what is read in any case stays last
            order = torch.arange(self.places + 1, device=self.share.device)
            order[-1] = places
            share = self.share.new_zeros(*self.share.shape[:2], places + 1)
            found["share"] = share.index_copy(2, order, self.share)
            rows = self.gram.new_zeros(*self.gram.shape[:2], places + 1, self.places + 1)
            rows = rows.index_copy(2, order, self.gram)
            gram = self.gram.new_zeros(*self.gram.shape[:2], places + 1, places + 1)
            found["gram"] = gram.index_copy(3, order, rows)
        return Lists(**found)

    def _tensors(self) -> dict[str, Tensor]:
        values = {own.name: getattr(self, own.name) for own in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def concatenated(parts: Sequence[Lists]) -> Lists:
    """Lists of several sources, one after the other, all padded to the most places.

    Args:
        parts: One or more.

    Raises:
        ValueError: There are none, or some have other columns or outputs than others.
    """
    if not parts:
        raise ValueError("There are no lists to put together: 0 were given. Give one or more.")
    widths = [part.width for part in parts]
    if wrong := [own for own in widths if own != widths[0]]:
        raise ValueError(
            f"Lists cannot be put together: some have {_said(widths[0])}, others {_said(wrong[0])}."
            " Give lists of one set of features, all with as many queries, or all without."
        )
    places = max(part.places for part in parts)
    tensors = [part.padded(places)._tensors() for part in parts]
    return Lists(**{name: torch.cat([own[name] for own in tensors]) for name in tensors[0]})


def _said(width: tuple[int, int, int]) -> str:
    return f"{width[0]} features of a frame, {width[1]} of a list and {width[2]} queries"


def column_moments(lists: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and population deviation of every column, of features over all candidates.

    Args:
        lists: Those that a student is taught on.

    Returns:
        Means and deviations of features ``[K]``, then of context ``[C]``; a deviation that is only
        rounding is 0.

    Raises:
        ValueError: There is no candidate in any list.
    """
    features = lists.features[lists.candidate].double()
    if not len(features):
        raise ValueError(
            f"Nothing can be said of the columns of {len(lists)} lists without a single candidate. "
            "Give longer clips, or smaller budgets, so that there is something to drop."
        )
    return (*_moments(features), *_moments(lists.context.double()))


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Over the first axis."""
    mean = rows.mean(0)
    deviation = (rows - mean).square().mean(0).sqrt()
    flat = deviation <= FLAT * rows.abs().amax(0)
    return mean.float(), deviation.masked_fill(flat, 0.0).float()
