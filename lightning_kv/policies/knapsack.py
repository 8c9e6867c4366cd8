"""Budgets that cost least by measured curves: exact, greedy, or with few different values.

Shapes: L layers, H heads, N = L H heads in layer-major order, K whole budgets from a least one on.
A curve says what a head loses at each of them. It need not fall: :func:`optimal` takes it as it
is, :func:`greedy` takes the largest convex curve below it (its minorant).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-12  # relative: two sums of the same losses in another order
SETS = 2048  # sets of values that are bounded together


def optimal(curves: Tensor, total: int, low: int) -> Tensor:
    """The budgets with the least sum of losses, exactly: a multiple-choice knapsack.

    Dynamic programme over heads and frames spent, ``f_m(B) = min_j f_{m-1}(B - j) + L_m(j)``. Of
    equal sums that which gives earlier heads more.

    Args:
        curves: float64 ``[L, H, K]``: loss at ``low``, ``low + 1``, ...
        total: Frames of all heads together, between ``N low`` and ``N (low + K - 1)``.
        low: The least budget.

    Returns:
        int64 ``[L, H]``, of sum ``total``.
    """
    costs = curves.double().flatten(0, 1)
    chosen = _cheapest(costs, range(costs.shape[1]), total - low * len(costs))
    return (chosen + low).view(curves.shape[:2])


def _cheapest(costs: Tensor, weights: Sequence[int], spare: int) -> Tensor | None:
    """Which of K weights each of N heads takes, int64 ``[N]``; None where none sum to ``spare``.

    Args:
        costs: float64 ``[N, K]``.
        weights: K ascending ones, from 0.
        spare: Their sum.
    """
    most = weights[-1]
    back = torch.tensor([most - w for w in reversed(weights)])  # the largest weight first
    costs = costs.flip(1)
    padded = costs.new_full((most + spare + 1,), torch.inf)
    padded[most] = 0
    taken = torch.empty(len(costs), spare + 1, dtype=torch.int16)
    for head in reversed(range(len(costs))):
        before = padded.unfold(0, spare + 1, 1).index_select(0, back)  # [K, spare + 1]
        least, which = (before + costs[head].unsqueeze(1)).min(0)  # of equal ones the first
        padded[most:], taken[head] = least, which
    if padded[-1].isinf():
        return None
    left, chosen = spare, []
    for own in taken:
        chosen.append(len(weights) - 1 - int(own[left]))
        left -= weights[chosen[-1]]
    return torch.tensor(chosen)


def minorant(curves: Tensor) -> Tensor:
    """The largest convex curve at or below each one, float64 ``[L, H, K]``.

    Its increments are the isotonic regression of the curve's own, which pool-adjacent-violators
    finds: "convex hull" and "isotonic" budgets (LU-KV, arXiv 2602.08585) are one method.
    """
    return _below(curves)[0]


def _below(curves: Tensor) -> tuple[Tensor, Tensor]:
    """The minorant, and what each frame gains on it ``[L, H, K - 1]``, equal along a segment."""
    lines, gains = [], []
    for own in curves.double().flatten(0, 1).tolist():
        corners: list[int] = []
        for b, value in enumerate(own):
            while len(corners) > 1 and _above(own, corners[-2], corners[-1], b, value):
                corners.pop()
            corners.append(b)
        line, gain = [own[0]], []
        for i, j in itertools.pairwise(corners):
            slope = (own[j] - own[i]) / (j - i)
            line += [own[i] + slope * step for step in range(1, j - i)] + [own[j]]
            gain += [-slope] * (j - i)
        lines.append(line)
        gains.append(gain)
    shape = curves.shape[:2]
    found = (torch.tensor(x, dtype=torch.float64).view(*shape, -1) for x in (lines, gains))
    return next(found), next(found)


def _above(own: list[float], i: int, j: int, b: int, value: float) -> bool:
    """Whether a corner at ``j`` lies on or above the line from ``i`` to the point at ``b``."""
    return (own[j] - own[i]) * (b - i) >= (value - own[i]) * (j - i)


def greedy(curves: Tensor, total: int, low: int) -> Tensor:
    """The frames that gain most on the minorants: as good as :func:`optimal` up to one segment.

    Only the last segment can be cut, so the loss is within :func:`gap` of the least. Ties go to the
    earlier head.

    Args:
        curves: float64 ``[L, H, K]``.
        total: As in :func:`optimal`.
        low: The least budget.

    Returns:
        int64 ``[L, H]``, of sum ``total``.
    """
    gains = _below(curves)[1].flatten()
    order = gains.argsort(descending=True, stable=True)[: total - low * curves[..., 0].numel()]
    taken = torch.zeros_like(gains, dtype=torch.int64).scatter(0, order, 1)
    return low + taken.view(*curves.shape[:2], -1).sum(-1)


def gap(curves: Tensor) -> float:
    """The most that :func:`greedy` can lose against :func:`optimal`: how far curves are above."""
    return float((curves.double() - minorant(curves)).max())


def threshold(curves: Tensor, budgets: Tensor, low: int) -> float:
    """What the last frame gains, lambda*: the least gain that was taken, on the minorants.

    Where no head has more than the least budget, it is the largest that was not.
    """
    gains = _below(curves)[1]
    step = torch.arange(gains.shape[-1])
    taken = step < (budgets - low).unsqueeze(-1)
    return float(gains[taken].min() if taken.any() else gains.max())


def in_levels(curves: Tensor, total: int, low: int, levels: int) -> Tensor:
    """The least loss with at most so many different budgets: few lengths make few kernel calls.

    Every set of values is bounded from below by its linear relaxation (fractional greedy on the
    minorants), and solved exactly as long as its bound is below the best that was found.

    Args:
        curves: float64 ``[L, H, K]``.
        total: As in :func:`optimal`.
        low: The least budget.
        levels: 2 or 3.

    Returns:
        int64 ``[L, H]``, of sum ``total``.

    Raises:
        ValueError: No so few values have this sum.
    """
    costs = curves.double().flatten(0, 1)
    found = _sets(len(costs), costs.shape[1], total - low * len(costs), levels)
    bounds = [_bounds(costs, total - low * len(costs), own) for own in found.split(SETS)]
    bounds = torch.cat(bounds) if bounds else torch.empty(0)
    best, chosen = math.inf, None
    for index in bounds.argsort(stable=True).tolist():
        if bounds[index] >= best - ROUNDING * abs(best):
            break
        values = found[index]
        step = math.gcd(*(values[1:] - values[0]).tolist())
        weights = ((values - values[0]) // step).tolist()
        spare = (total - (low + int(values[0])) * len(costs)) // step
        which = _cheapest(costs[:, values], weights, spare)
        if which is None:  # few heads, and values too far apart
            continue
        own = values[which]
        loss = float(costs.gather(1, own.unsqueeze(1)).sum())
        if loss < best:
            best, chosen = loss, own
    if chosen is None:
        raise ValueError(
            f"No {levels} budgets between {low} and {low + costs.shape[1] - 1} frames sum to "
            f"{total} over {len(costs)} heads. Give more levels, or a mean of whole frames."
        )
    return (chosen + low).view(curves.shape[:2])


def _sets(heads: int, values: int, spare: int, levels: int) -> Tensor:
    """Sets of values, counted from the least budget, that may sum to ``spare``, ``[T, levels]``."""
    fit = []
    for own in itertools.combinations(range(values), min(levels, values)):
        left, step = spare - heads * own[0], math.gcd(*(v - own[0] for v in own[1:])) or 1
        if 0 <= left <= heads * (own[-1] - own[0]) and left % step == 0:
            fit.append(own)
    return torch.tensor(fit, dtype=torch.int64).view(len(fit), min(levels, values))


def _bounds(costs: Tensor, spare: int, sets: Tensor) -> Tensor:
    """What each set of two or three values loses at least, float64 ``[T]``."""
    each = costs.t()[sets]  # [T, G, N]
    width = sets.diff(dim=1).double().unsqueeze(2).expand(-1, -1, costs.shape[0])
    slope = each.diff(dim=1) / width
    if slope.shape[1] == 2:  # a middle point above the line between the others is none
        whole = (each[:, 2] - each[:, 0]) / width.sum(1)
        slope = torch.where((slope[:, 0] > slope[:, 1]).unsqueeze(1), whole.unsqueeze(1), slope)
    order = slope.flatten(1).argsort(dim=1, stable=True)
    slope, width = slope.flatten(1).gather(1, order), width.flatten(1).gather(1, order)
    left = (spare - costs.shape[0] * sets[:, :1]).double()
    spent = (left - (width.cumsum(1) - width)).clamp_min(0).minimum(width)
    return each[:, 0].sum(1) + (slope * spent).sum(1)
