"""What frames turn out to be worth, from tables of what the reference looked at later.

Shapes: C later chunks, H heads, U candidate frames, E queries, R of them that are drawn, D head
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kv.cache.outputs import FrameOutputs
from lightning_kv.cache.recorder import Clip
from lightning_kv.models.samplers import stable_seed
from lightning_kv.policies.hindsight import (
    ComingOutputs,
    Place,
    coming_mass,
    greedy_gains,
    mass_by_chunk,
)

TARGETS = ("mass-now", "mass-future", "max-future", "out-future", "next-use")
FLOOR = 1e-3  # shares well below it are all alike on the scale of max-future
TILT = 1e-3  # from the first to the last of frames that are worth the same together
BELOW = 0.5  # of the smallest step: what comes after it, where the softmax has mass 1


@dataclass(frozen=True, eq=False)
class Decision:
    """What there was to choose from when a chunk became final.

    Args:
        chunk: Which.
        places: Of every layer, in order; of one namespace.
        guards: Frames of each that stay in any case, bool ``[1 or H, U]``.

    Raises:
        ValueError: Places and guards do not fit together.
    """

    chunk: int
    places: tuple[Place, ...]
    guards: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        frames = [len(place.frames) for place in self.places]
        guards = [guard.shape[-1] for guard in self.guards]
        if frames != guards:
            raise ValueError(
                f"The places of a decision at chunk {self.chunk} have {frames} frames, and its "
                f"guards {guards}. Give one guard for each place, for the same frames."
            )


@dataclass(frozen=True, eq=False)
class OutputProblem:
    """What some later queries get from the frames of one layer: the error of any set of them.

    For a set m, with the last place in it, the squared error of a query's output is
    ``m' G m / (m' p)^2``.

    Args:
        share: Softmax share p of each candidate, and last of all that is read in any case: guarded
            frames, those made later and those in flight. 0 where a head has no such candidate.
            What it has dropped before has no place. ``[H, R, U + 1]``.
        gram: Scalar products G of their pulls, ``[H, R, U + 1, U + 1]``.
        query: What each query counts, ``[H, R]``; 0 where there is no later chunk.
    """

    share: Tensor
    gram: Tensor
    query: Tensor


@dataclass(frozen=True)
class Teacher:
    """Says what keeping a frame is worth, by what later chunks of the reference do with it.

    The reference must hold all frames, as ``full`` does: of one that it has dropped itself nothing
    is known. Close to the end of a clip fewer chunks than the horizon are left: means are over
    those, and the decision counts less (:meth:`weight`).

    Args:
        target: ``mass-now``: softmax mass in the chunk itself. ``mass-future``: in later chunks,
            discounted mean. ``max-future``: the most in any of them, on a logarithmic scale from 0
            to 1. ``out-future``: how much less of the outputs' error each frame leaves where those
            that help most are taken first. ``next-use``: 1 over the number of chunks to the first
            that looks at it with a share above the threshold.
        horizon: Chunks ahead that count; all to the end of the clip where None.
        discount: What each later chunk counts of the one before.
        queries: Queries of each pass whose outputs are recorded.
        threshold: A softmax share above it is a use.

    Raises:
        ValueError: An unknown target, or a number out of range.
    """

    target: str = "out-future"
    horizon: int | None = None
    discount: float = 0.8
    queries: int = 4
    threshold: float = 0.15

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(
                f"A teacher was asked for the target {self.target!r}, which is unknown. Use one "
                f"of: {', '.join(TARGETS)}."
            )
        share = {
            name: isinstance(own := getattr(self, name), (int, float)) and 0 <= own <= 1
            for name in ("discount", "threshold")
        }
        fine = {
            "horizon": self.horizon is None or (type(self.horizon) is int and self.horizon >= 1),
            "queries": type(self.queries) is int and self.queries >= 1,
            "discount": share["discount"],
            "threshold": share["threshold"] and self.threshold < 1,
        }
        if wrong := [f"{name}={getattr(self, name)}" for name, yes in fine.items() if not yes]:
            raise ValueError(
                f"A teacher was given {', '.join(wrong)}, out of range. Use a horizon and queries "
                "of 1 or more, whole numbers (or no horizon, null), a discount from 0 to 1, and a "
                "threshold from 0 to below 1."
            )

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """Tables to record for :meth:`targets`, with their settings."""
        outputs = {"outputs": {"queries": self.queries}} if self.target == "out-future" else {}
        return {"mass": {}, **outputs}

    def coming(self, clip: Clip, chunk: int) -> range:
        """Later chunks of a clip that count for a decision, the nearest first."""
        end = clip.chunks if self.horizon is None else chunk + 1 + self.horizon
        return range(chunk + 1, min(clip.chunks, end))

    def weight(self, clip: Clip, chunk: int) -> float:
        """The share of the horizon that a clip shows after a chunk, 0 where it shows nothing."""
        seen = len(self.coming(clip, chunk))
        if self.target == "mass-now":
            return 1.0
        return seen / self.horizon if self.horizon is not None else float(seen > 0)


def targets(teacher: Teacher, tables: Mapping[str, Any], decision: Decision) -> list[Tensor]:
    """What each candidate is worth, float32 ``[H, U]`` of every layer: 0 or more, 0 off candidates.

    Args:
        teacher: Says by what.
        tables: Of one clip, by name, as :attr:`Teacher.needs` says.
        decision: What there was to choose from.
    """
    clip, found = tables["mass"].clip, []
    now = range(decision.chunk, decision.chunk + 1)
    chunks = now if teacher.target == "mass-now" else teacher.coming(clip, decision.chunk)
    for place, guard in zip(decision.places, decision.guards, strict=True):
        candidate = candidates(place, guard)
        worth = torch.zeros(clip.geometry.heads, len(place.frames), device=candidate.device)
        if chunks:
            worth = _RULES[teacher.target](teacher, tables, place, guard, chunks).float()
        found.append(worth.masked_fill(~candidate, 0))
    return found


def output_problems(
    teacher: Teacher, table: FrameOutputs, decision: Decision, count: int, key: str
) -> list[OutputProblem]:
    """Queries drawn from later chunks, and what they get from each candidate, of every layer.

    A query is drawn with a probability in proportion to what it counts: those of a chunk together
    ``discount ** (chunks ahead - 1)``. So drawn queries count alike.

    Args:
        teacher: Says how far ahead, and by what discount.
        table: What frames gave to some queries.
        decision: What there was to choose from.
        count: How many are drawn. One that counts much may be drawn more than once.
        key: Of the clip. Draws depend on it, the namespace, the chunk and the layer.
    """
    chunks, found = teacher.coming(table.clip, decision.chunk), []
    for place, guard in zip(decision.places, decision.guards, strict=True):
        if not chunks:
            found.append(_nothing(table.clip.geometry.heads, count, place))
            continue
        coming = ComingOutputs.of(table, place, chunks, teacher.discount)
        seed = stable_seed(key, place.namespace, decision.chunk, place.layer)
        coming = coming.of_queries(drawn(coming.weight, count, seed))
        found.append(_problem(coming, place, guard))
    return found


def candidates(place: Place, guard: Tensor) -> Tensor:
    """Frames that may be kept or dropped, bool ``[1 or H, U]``."""
    return place.present & ~guard.to(place.present.device)


def drawn(weight: Tensor, count: int, seed: int) -> Tensor:
    """Systematic sampling: each is drawn ``count`` times its share of the weight on average.

    One number of the seed places a comb over the cumulated weights, so that draws are spread over
    near and far queries.

    Args:
        weight: ``[E]``, 0 or more, some above 0.
        count: Number R of draws.
        seed: 63 bits.

    Returns:
        Places in ``weight``, ascending, int64 ``[R]``.
    """
    share = weight.double().cumsum(0)
    start = (seed >> 10) / 2**53  # 53 bits, which a float64 holds: below 1
    comb = (torch.arange(count, dtype=torch.float64, device=share.device) + start) / count
    return torch.searchsorted(share / share[-1], comb, right=True).clamp_max(len(share) - 1)


def _problem(coming: ComingOutputs, place: Place, guard: Tensor) -> OutputProblem:
    heads, queries, _ = coming.share.shape
    free = candidates(place, guard).expand(heads, -1).to(coming.share)
    kept = (guard.to(place.present.device) & place.present).expand(heads, -1)
    total, rest = coming.over(kept.to(coming.share.device))
    share = torch.cat([coming.share * free.unsqueeze(1), total.unsqueeze(-1)], -1)
    pull = torch.cat([coming.pull * free[:, None, :, None], rest.unsqueeze(2)], 2)
    query = share.new_full((heads, queries), 1 / queries)
    gram = pull @ pull.transpose(2, 3)
    device = place.present.device
    return OutputProblem(share.to(device), gram.to(device), query.to(device))


def _nothing(heads: int, count: int, place: Place) -> OutputProblem:
    """Queries that count nothing; all they see is read in any case."""
    units, of = len(place.frames) + 1, place.present.device
    share = torch.zeros(heads, count, units, device=of)
    share[..., -1] = 1
    gram = torch.zeros(heads, count, units, units, device=of)
    return OutputProblem(share, gram, torch.zeros(heads, count, device=of))


# -- what a frame is worth ---------------------------------------------------------------------


def _mass(
    teacher: Teacher, tables: Mapping[str, Any], place: Place, guard: Tensor, chunks: range
) -> Tensor:
    """Softmax mass, discounted mean of some chunks."""
    total = coming_mass(tables["mass"], place, chunks, teacher.discount)[:, 0]
    return total / sum(teacher.discount**ahead for ahead in range(len(chunks)))


def _most(
    teacher: Teacher, tables: Mapping[str, Any], place: Place, guard: Tensor, chunks: range
) -> Tensor:
    """The most softmax mass in any of them, on a logarithmic scale."""
    most = mass_by_chunk(tables["mass"], place, chunks).amax(0).double()
    worth = (most / FLOOR).log1p() / math.log1p(1 / FLOOR)
    return worth.to(place.present.device)


def _use(
    teacher: Teacher, tables: Mapping[str, Any], place: Place, guard: Tensor, chunks: range
) -> Tensor:
    """1 / chunks to the next use; of those that are used next together, mass decides."""
    used = mass_by_chunk(tables["mass"], place, chunks) > teacher.threshold
    ahead = torch.arange(1, len(chunks) + 1, device=used.device).view(-1, 1, 1)
    nearest = torch.where(used, 1.0 / ahead.double(), 0.0).amax(0).to(place.present.device)
    step = 1 / (len(chunks) * (len(chunks) + 1))  # the smallest between two chunks
    return nearest + BELOW * step * _mass(teacher, tables, place, guard, chunks)


def _outputs(
    teacher: Teacher, tables: Mapping[str, Any], place: Place, guard: Tensor, chunks: range
) -> Tensor:
    """Gains of greedy steps, so that a longer way is never worth more; behind them by mass.

    Where a step brings more than the one before it, the frames of both are worth their mean, as
    neither does it alone; that keeps the order, and the sum.
    """
    steps = int(candidates(place, guard).sum(-1).max())
    ranks, gains = greedy_gains(tables["outputs"], place, chunks, teacher.discount, guard, steps)
    order = ranks[:, 0].argsort(-1, descending=True)
    worth = falling(gains[:, 0].double().gather(1, order)).clamp_min(0)
    tilt = torch.linspace(1, 1 - TILT, len(place.frames), dtype=worth.dtype, device=worth.device)
    worth = worth * tilt
    worth = torch.zeros_like(worth).scatter(1, order, worth)
    least = worth.masked_fill(worth <= 0, torch.inf).amin(-1, keepdim=True)
    rest = BELOW * torch.where(least < torch.inf, least, 1.0)
    return torch.where(worth > 0, worth, rest * _mass(teacher, tables, place, guard, chunks))


_RULES = {
    "mass-now": _mass,
    "mass-future": _mass,
    "max-future": _most,
    "out-future": _outputs,
    "next-use": _use,
}


def falling(values: Tensor) -> Tensor:
    """The nearest sequences, by squares, that never rise; their sums stay, ``[H, S]``.

    Isotonic regression as a minimum of maxima of means (Barlow et al., Statistical Inference under
    Order Restrictions, 1972).
    """
    count = values.shape[-1]
    place = torch.arange(count, device=values.device)
    ends = F.pad(values.cumsum(-1), (1, 0))
    span = (place + 1 - place.unsqueeze(1)).clamp_min(1)  # from i to j
    mean = (ends[:, None, 1:] - ends[:, :-1, None]) / span
    mean = mean.masked_fill(place < place.unsqueeze(1), -torch.inf)
    most = mean.flip(-1).cummax(-1).values.flip(-1)  # from i to j or further
    return most.masked_fill(place < place.unsqueeze(1), torch.inf).amin(1)
