"""Rules that divide frames among heads: how many each may keep, given how many all may.

Every rule but ``focused`` gives exactly the total that was asked for and stays within the limits;
ties go to the earlier layer, then the earlier head. Those that look at curves are in
:mod:`lightning_kv.policies.knapsack`.

Shapes: L layers, H heads, K whole budgets from the least to the most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.policies.budget.importance import budgets as by_importance
from lightning_kv.policies.budget.pyramid import line
from lightning_kv.policies.knapsack import greedy, in_levels, optimal

UNMEASURED = ("uniform", "pyramid", "pyramid-reversed")
"""Rules that need no measurement."""

BY_IMPORTANCE = ("focused", "focused-matched", "published", "proportional", "log")
"""Rules that look at one number for each head."""

BY_CURVES = ("optimal", "greedy", "levels", "shuffled")
"""Rules that look at what each head loses at each budget."""

RULES = (*UNMEASURED, *BY_IMPORTANCE, *BY_CURVES)

PUBLISHED = {-1: 14, 0: 341, 1: 4, 4: 1}
"""Focused Forcing's published budgets (arXiv 2605.18346, its table under its rule from 4 to 9
frames, the chunk included): how many of 360 heads get how much more than 5."""

NEAR = 1e-9  # frames: what differs by less is rounding


@dataclass(frozen=True, eq=False)
class Heads:
    """What a rule may look at.

    Args:
        layers: Number L of layers.
        heads: Number H of heads of each.
        low: The least that a head may get, in frames.
        high: The most.
        curves: float64 ``[L, H, high - low + 1]``: loss at ``low``, ``low + 1``, ... frames; None
            where it is not known.
        importance: float64 ``[L, H]``; None where it is not known.
    """

    layers: int
    heads: int
    low: int
    high: int
    curves: Tensor | None = None
    importance: Tensor | None = None


@dataclass(frozen=True)
class Knobs:
    """Settings of the rules.

    Args:
        gamma: Of ``focused`` and ``focused-matched``: above 1, the middle heads come closer to the
            least.
        beta: Of the pyramids: the last layer gets 1 / ``beta`` of the mean beside the least.
        levels: Of ``levels``: most different budgets, 2 or 3.
        seed: Of ``shuffled``.
    """

    gamma: float = 2.0
    beta: float = 20.0
    levels: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("gamma", self.gamma > 0, "a number above 0"),
            ("beta", self.beta >= 1, "1 or more"),
            ("levels", self.levels in (2, 3), "2 or 3 (one level is the rule uniform)"),
        ):
            if not fits:
                raise ValueError(
                    f"{name}={getattr(self, name)} of an allocation does not work. Give {wanted}."
                )


def allocate(rule: str, mean: float, of: Heads, knobs: Knobs = Knobs()) -> Tensor:
    """Frames of every head by a rule.

    Args:
        rule: One of :data:`RULES`.
        mean: Frames per head on average; the total is ``round(L H mean)``. For ``focused`` the
            most, that of the most important head: its mean is an outcome.
        of: What is known of the heads.
        knobs: Settings of the rules.

    Returns:
        int64 ``[L, H]``.

    Raises:
        ValueError: No such rule, a mean beyond the limits, or the rule lacks what it looks at.
    """
    _check(rule, mean, of)
    shape, low, high = (of.layers, of.heads), of.low, of.high
    total = round(of.layers * of.heads * mean)
    if rule == "focused":
        return focused(of.importance, low, mean, knobs.gamma)
    if low == high:
        return torch.full(shape, low)
    made: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: uniform(*shape, total),
        "pyramid": lambda: pyramid(*shape, total, low, high, knobs.beta),
        "pyramid-reversed": lambda: pyramid(*shape, total, low, high, knobs.beta, reverse=True),
        "focused-matched": lambda: matched(of.importance, total, low, high, knobs.gamma),
        "published": lambda: published(of.importance, total, low, high),
        "proportional": lambda: proportional(of.importance, total, low, high),
        "log": lambda: logarithmic(of.importance, decay(of.curves), total, low, high),
        "optimal": lambda: optimal(of.curves, total, low),
        "greedy": lambda: greedy(of.curves, total, low),
        "levels": lambda: in_levels(of.curves, total, low, knobs.levels),
        "shuffled": lambda: shuffled(optimal(of.curves, total, low), knobs.seed),
    }
    return made[rule]()


def _check(rule: str, mean: float, of: Heads) -> None:
    """Refuse what cannot be divided."""
    check_rule(rule)
    lacks = [
        what
        for what, known, rules in (
            ("importances", of.importance, BY_IMPORTANCE),
            ("curves", of.curves, (*BY_CURVES, "log")),
        )
        if known is None and rule in rules
    ]
    if lacks:
        raise ValueError(
            f"The rule {rule!r} looks at {' and '.join(lacks)} of the heads, and none are given. "
            f"Give a file that `lightning-kv calibrate` made, or use {', '.join(UNMEASURED)}."
        )
    if not of.low <= mean <= of.high:
        raise ValueError(
            f"A mean of {mean:g} frames cannot be divided into budgets from {of.low} to {of.high}. "
            "Give a mean between them, or other limits (least, most) within what was measured."
        )


def check_rule(rule: str) -> None:
    """Refuse a rule that there is not.

    Raises:
        ValueError: Says which there are.
    """
    if rule not in RULES:
        raise ValueError(
            f"No allocation rule {rule!r}. Use one of: {', '.join(RULES)}; what depends on the "
            "scores of each input is the budget part adaptive, or calibrated-layers."
        )


def uniform(layers: int, heads: int, total: int) -> Tensor:
    """The same for all, int64 ``[L, H]``; what is left goes to heads spaced evenly, one each."""
    each, left = divmod(total, layers * heads)
    out = torch.full((layers * heads,), each)
    out[[index * layers * heads // left for index in range(left)]] += 1
    return out.view(layers, heads)


def focused(importance: Tensor, least: float, most: float, gamma: float = 2.0) -> Tensor:
    """Focused Forcing's own rule (arXiv 2605.18346), int64 ``[L, H]``; its total is an outcome.

    Args:
        importance: ``[L, H]``, scaled to [0, 1] over all heads of the model.
        least: Of the least important head, in frames.
        most: Of the most important one.
        gamma: Its power.
    """
    rows = tuple(map(tuple, importance.double().tolist()))
    return torch.tensor(by_importance(rows, gamma, most, least), dtype=torch.int64)


def matched(importance: Tensor, total: int, low: int, high: int, gamma: float = 2.0) -> Tensor:
    """The shape of :func:`focused`, shifted by a constant until it has the total."""
    value = importance.double()
    span = value.max() - value.min()
    share = (value - value.min()) / span if span > 1e-12 else torch.full_like(value, 0.5)
    real = low + share**gamma * (high - low)
    return _rounded(_shifted(real, total, low, high), total)


def published(importance: Tensor, total: int, low: int, high: int) -> Tensor:
    """As uneven as Focused Forcing's published budgets, see :data:`PUBLISHED`: nearly uniform.

    Heads of the same rank by importance get as much more or less than the others as there; what is
    left goes to the most important ones.
    """
    more = torch.tensor([by for by, heads in PUBLISHED.items() for _ in range(heads)])
    rank = importance.flatten().argsort(stable=True).argsort()
    own = more[((rank + 0.5) * len(more) / len(rank)).long()]
    even, left = divmod(total - int(own.sum()), len(own))
    real = (own + even + (rank >= len(own) - left)).double().view(importance.shape)
    return _rounded(_shifted(real, total, low, high), total)


def pyramid(
    layers: int, heads: int, total: int, low: int, high: int, beta: float, reverse: bool = False
) -> Tensor:
    """PyramidKV's line over the layers (arXiv 2406.02069); ``reverse`` gives upper ones more."""
    real = torch.tensor(line(layers, total / (layers * heads), low, beta), dtype=torch.float64)
    real = (real.flip(0) if reverse else real).unsqueeze(1).expand(-1, heads)
    return _rounded(_shifted(real, total, low, high), total)


def proportional(importance: Tensor, total: int, low: int, high: int) -> Tensor:
    """The least for all, and shares of the rest in proportion to importance (as HeadKV does).

    Heads without any importance get the least as long as the others have room.
    """
    value = importance.double().clamp_min(0)
    top = float(value.max())
    value = (value / top).clamp_min(NEAR) if top > 0 else torch.ones_like(value)
    most = 2 * (high - low) / float(value.min())
    real = _meeting(lambda scale: (low + scale * value).clamp(low, high), total, 0.0, most)
    return _rounded(real, total)


def logarithmic(importance: Tensor, rate: float, total: int, low: int, high: int) -> Tensor:
    """Water filling: optimal where heads lose ``A exp(-rate (b - low))``, A their importance.

    ``b = low + max(0, (ln A - theta) / rate)``, with theta such that the total is met.

    Args:
        importance: ``[L, H]``: A; heads without any count as the least important of all.
        rate: Common decay per frame, above 0 (:func:`decay`).
        total: Frames of all heads.
        low: The least.
        high: The most.
    """
    value = importance.double()
    known = value[value > 0]
    floor = float(known.min()) * 1e-6 if len(known) else 1.0
    level = value.clamp_min(floor).log() / rate
    start, end = -float(level.max()), high - low - float(level.min())
    real = _meeting(lambda shift: (low + level + shift).clamp(low, high), total, start, end)
    return _rounded(real, total)


def decay(curves: Tensor) -> float:
    """Common decay per frame of all heads: of a line through the logs of the mean curve.

    Args:
        curves: ``[L, H, K]``; points without loss are left out.

    Raises:
        ValueError: The mean curve does not fall.
    """
    mean = curves.double().mean((0, 1))
    at = (mean > 0).nonzero().flatten().double()
    off = at - at.mean()
    logs = mean[mean > 0].log()
    rate = -float((off * logs).sum() / (off**2).sum()) if len(at) > 1 else math.nan
    if not rate > 0:
        raise ValueError(
            f"The mean curve of the heads does not fall (decay {rate:g} per frame from "
            f"{len(at)} points), and the rule log divides by its decay. Use the rule optimal, or "
            "measure more prompts."
        )
    return rate


def shuffled(budgets: Tensor, seed: int) -> Tensor:
    """The same budgets given to other heads, drawn from a seed: the control of an assignment."""
    order = torch.randperm(budgets.numel(), generator=torch.Generator().manual_seed(seed))
    return budgets.flatten()[order].view_as(budgets)


def _shifted(real: Tensor, total: int, low: int, high: int) -> Tensor:
    """All moved by one constant, and cut at the limits, so that they sum to the total."""
    start, end = low - float(real.max()), high - float(real.min())
    return _meeting(lambda shift: (real + shift).clamp(low, high), total, start, end)


def _meeting(of: Callable[[float], Tensor], total: int, start: float, end: float) -> Tensor:
    """The first value of a function that grows with its argument whose sum is the total."""
    while start < (middle := start + (end - start) / 2) < end:
        few = of(middle).flatten().sort().values.sum() < total  # sorted: heads have no order
        start, end = (middle, end) if few else (start, middle)
    return of(end)


def _rounded(real: Tensor, total: int) -> Tensor:
    """Whole numbers with that sum, int64: down, and one more for the largest remainders."""
    whole = (real + NEAR).floor()
    rest = ((real - whole) / NEAR).round().flatten()
    left = total - int(whole.sum())
    out = whole.long().flatten()
    out[rest.argsort(descending=True, stable=True)[:left]] += 1
    return out.view_as(real)
