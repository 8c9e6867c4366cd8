"""What measured curves of heads say, and how sure it is: shrinkage, spread, gain out of bag.

Shapes: P prompts, L layers, H heads, K whole budgets from a least one on, Bn budgets of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.policies.knapsack import threshold

OBJECTIVES = ("mean", "cvar")
WORST = 4  # cvar is the mean of the worst one in so many prompts


def summed_up(curves: Tensor, objective: str = "mean") -> tuple[Tensor, Tensor | None]:
    """One curve for each head from those of the prompts, and its standard error.

    Args:
        curves: float64 ``[P, L, H, Bn]``.
        objective: ``mean`` over prompts, or ``cvar``: the mean of the worst quarter of them, for
            each head and budget.

    Returns:
        Two of ``[L, H, Bn]``; no error where one prompt is left.

    Raises:
        ValueError: No such objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"No objective {objective!r}. Use one of: {', '.join(OBJECTIVES)}.")
    own = curves.double()
    if objective == "cvar":
        return _worst(own)
    error = own.std(0) / math.sqrt(len(own)) if len(own) > 1 else None
    return own.mean(0), error


def _worst(prompts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean of the worst quarter of the prompts, and its standard error by the jackknife."""
    count = len(prompts)
    falling = prompts.sort(dim=0, descending=True, stable=True).values
    worst = -(-count // WORST)
    mean = falling[:worst].mean(0)
    if count < 2:
        return mean, None
    left = -(-(count - 1) // WORST)  # the worst of the others, once one is left out
    sums = falling.cumsum(0)
    inside = (sums[left] - falling[:left]) / left
    outside = (sums[left - 1] / left).expand(count - left, *mean.shape)
    without = torch.cat([inside, outside])
    return mean, ((count - 1) * without.var(0, correction=0)).sqrt()


def shrunken(mean: Tensor, error: Tensor | None) -> Tensor:
    """Log-curves moved towards the mean log-curve of their layer, as far as they are noise.

    Each by ``tau^2 / (tau^2 + s^2)``: s is its standard error (of the log, relative to the mean),
    tau^2 the variance between the heads of a layer by the method of moments, one for each budget,
    pooled over layers. Points without loss, whose log does not exist, stay as they are. A curve
    need not fall afterwards.

    Args:
        mean: float64 ``[L, H, Bn]``.
        error: Alike: standard errors.

    Returns:
        Alike.

    Raises:
        ValueError: There are no standard errors.
    """
    if error is None:
        raise ValueError(
            "Curves cannot be shrunk: one prompt tells nothing of their noise. Give two prompts or "
            "more, or switch shrinkage off (shrink: false)."
        )
    known = mean > 0
    logs = torch.where(known, mean, 1.0).log()
    noise = torch.where(known, error / torch.where(known, mean, 1.0), 0.0) ** 2
    count = known.sum(1, keepdim=True)
    centre = logs.sum(1, keepdim=True) / count.clamp_min(1)
    off = torch.where(known, logs - centre, 0.0)
    freedom = (count - 1).clamp_min(0).double()
    extra = (off**2).sum(1, keepdim=True) - noise.sum(1, keepdim=True) * freedom / count.clamp_min(
        1
    )
    spread = (extra.sum(0) / freedom.sum(0).clamp_min(1)).clamp_min(0)  # [1, Bn]
    weight = torch.where(noise > 0, spread / (spread + noise), 1.0)
    moved = torch.where(freedom > 0, centre + weight * off, logs)
    return torch.where(known, moved.exp(), mean)


def each_frame(budgets: Sequence[int], curves: Tensor, low: int, high: int) -> Tensor:
    """Curves at every whole budget ``[..., high - low + 1]``: straight lines between the measured.

    Args:
        budgets: Bn ascending ones that were measured.
        curves: ``[..., Bn]``.
        low: First budget, not below the first that was measured.
        high: Last one, not above the last.
    """
    grid = torch.tensor(budgets)
    at = torch.arange(low, high + 1)
    right = torch.searchsorted(grid, at).clamp(1, max(1, len(grid) - 1))
    if len(grid) == 1:
        return curves.expand(*curves.shape[:-1], len(at))
    left = right - 1
    share = (at - grid[left]).double() / (grid[right] - grid[left])
    return torch.where(
        share == 1, curves[..., right], curves[..., left] * (1 - share) + curves[..., right] * share
    )


def loss_of(curves: Tensor, budgets: Tensor, low: int) -> float:
    """What all heads lose together, if their losses add up.

    Args:
        curves: ``[L, H, K]``: loss at ``low``, ``low + 1``, ...
        budgets: int64 ``[L, H]``.
        low: The least budget.
    """
    return float(curves.gather(2, (budgets - low).unsqueeze(2)).sum())


def am_gm(importance: Tensor) -> float | None:
    """Arithmetic over geometric mean: what uniform loses against the optimum, at best.

    Exact where heads lose ``A exp(-k b)`` with one k: ``exp(sigma^2 / 2)`` for log-normal A. None
    where a head has no importance at all: then nothing bounds it.
    """
    value = importance.double()
    if (value <= 0).any():
        return None
    return float(value.mean() / value.log().mean().exp())


def gini(budgets: Tensor) -> float:
    """Gini coefficient of budgets: 0 where all are the same, near 1 where one head has all."""
    value = budgets.double().flatten().sort().values
    rank = torch.arange(1, len(value) + 1, dtype=torch.float64)
    total = float(value.sum())
    return float(((2 * rank - len(value) - 1) * value).sum()) / (len(value) * total)


def undecided(prompts: Tensor, curves: Tensor, budgets: Tensor, low: int) -> tuple[float, Tensor]:
    """What the last frame gains, and the heads that may as well get one more or one less.

    Args:
        prompts: ``[P, L, H, K]``, for standard errors of gains.
        curves: ``[L, H, K]`` that the budgets were solved on.
        budgets: int64 ``[L, H]``.
        low: The least budget.

    Returns:
        lambda*, and bool ``[L, H]``: the gain of the last frame given, or of the next one, lies
        within 2 standard errors of it.
    """
    last = threshold(curves, budgets, low)
    gains, each = -curves.diff(dim=-1), -prompts.double().diff(dim=-1)
    error = each.std(0) / math.sqrt(len(each)) if len(each) > 1 else torch.zeros_like(gains)
    close = (gains - last).abs() <= 2 * error
    step, at = torch.arange(gains.shape[-1]), (budgets - low).unsqueeze(-1)
    return last, (close & ((step == at) | (step == at - 1))).any(-1)


@dataclass(frozen=True)
class Bootstrap:
    """What became of budgets that were solved on resampled prompts.

    Args:
        gains: Log of their loss over that of uniform budgets, on the prompts that were not drawn
            (never solved again on those): below 0 where they are better.
        regrets: How much of what the budgets of all prompts gain on all prompts they miss; 0 is
            the same, 1 is no better than uniform. Empty where nothing can be gained.
        gain: The log-ratio of the budgets of all prompts on these same prompts: too good.
    """

    gains: tuple[float, ...]
    regrets: tuple[float, ...]
    gain: float

    def quantile(self, share: float) -> float:
        """Of the gains."""
        return float(torch.tensor(self.gains, dtype=torch.float64).quantile(share))

    def ratio(self, share: float) -> float:
        """The same as a ratio of losses."""
        return math.exp(self.quantile(share))

    @property
    def regret(self) -> float | None:
        """The 90th percentile of the regrets; None where nothing can be gained."""
        own = torch.tensor(self.regrets, dtype=torch.float64)
        return float(own.quantile(0.9)) if self.regrets else None

    @property
    def sure(self) -> bool:
        """Whether 95 of 100 resamples are better than uniform on prompts they have not seen."""
        return self.quantile(0.95) < 0


def resampled(
    budgets: Sequence[int],
    prompts: Tensor,
    solve: Callable[[Tensor], Tensor],
    even: Tensor,
    draws: int = 200,
    seed: int = 0,
) -> Bootstrap:
    """Solve budgets on resampled prompts, and judge them on those that were not drawn.

    They are judged by the mean over prompts, whatever they were solved for.

    Args:
        budgets: The grid.
        prompts: float64 ``[P, L, H, Bn]``.
        solve: From prompts ``[P, L, H, Bn]`` to budgets ``[L, H]``.
        even: Uniform budgets of the same total.
        draws: Number of resamples.
        seed: Of the draws.

    Raises:
        ValueError: Fewer than three prompts, or uniform budgets lose nothing.
    """
    low, count = budgets[0], len(prompts)
    losses = each_frame(budgets, prompts, low, budgets[-1])
    best, whole = solve(prompts), losses.mean(0)
    least, most = loss_of(whole, best, low), loss_of(whole, even, low)
    if count < 3 or least <= 0 or most <= 0:
        raise ValueError(
            f"Nothing can be judged out of bag: {count} prompts, on which uniform budgets lose "
            f"{most:g} and these {least:g}. Give three prompts or more, and a mean below what is "
            "there."
        )
    generator = torch.Generator().manual_seed(seed)
    gains, regrets = [], []
    while len(gains) < draws:
        drawn = torch.randint(count, (count,), generator=generator).sort().values
        others = torch.ones(count, dtype=torch.bool).index_fill(0, drawn, False)
        if not others.any() or len(drawn.unique()) < 2:  # nothing to judge on, or no noise seen
            continue
        own, rest = solve(prompts[drawn]), losses[others].mean(0)
        mine, theirs = loss_of(rest, own, low), loss_of(rest, even, low)
        gains.append(math.log(mine / theirs) if mine > 0 and theirs > 0 else 0.0)
        if most > least:
            regrets.append((loss_of(whole, own, low) - least) / (most - least))
    return Bootstrap(tuple(gains), tuple(regrets), math.log(least / most))
