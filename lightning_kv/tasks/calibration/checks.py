"""How far measured curves can be trusted: cheap against exact losses, and when to stop.

Shapes: P prompts, L layers, H heads, M = L H heads in all, N budgets of the grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_kv.calibration.reduction import Reduced
from lightning_kv.policies.allocation import allocate
from lightning_kv.policies.curve_statistics import shrunken, summed_up
from lightning_kv.policies.head_curves import HeadCurves, limited
from lightning_kv.stats.reliability import (
    LEAST,
    Correlation,
    disattenuated,
    rank_correlation,
    share_off_median,
    split_half,
)
from lightning_kv.stats.stopping import LOOKS, Look, Solve, look, next_look
from lightning_kv.utilities.formatting import number, several

GATES = ((0.9, "probes"), (0.7, "screen"), (-1.0, "exact"))
"""Least lower bound of the rank correlation of probes with exact losses, and what it allows."""

WAY = "measure all exactly (--exact all, --validate as many as --prompts) and use metric: exact"


def agreement(reduced: Reduced, validated: Sequence[str], mean: float) -> dict[str, Any]:
    """Cheap against exact losses on the prompts that validate, for ``about["checks"]``.

    Args:
        reduced: Of all prompts.
        validated: Keys of those that were also measured exactly.
        mean: Budget that is asked about.

    Returns:
        Plain data: ``spearman_gn_exact`` ``[estimate, low, high]`` across heads where the least
        budget is kept, what it allows (``gate``), the same for the budget that is ``nearest`` to
        the mean, for other ``budgets`` and measures, how well each repeats itself, the median of
        ``|log gn / exact|``, and the numerical ``floor``.
    """
    if not validated:
        return {"validated": [], "gate": None, "why": "no prompt was measured exactly"}
    settings = reduced.settings
    found: dict[str, Any] = {
        "validated": sorted(validated),
        "floor": float(reduced.stacked("floor", validated).max()),
        "budgets": {},
    }
    for scorer in settings.scorers if settings.exact else ():
        exact = reduced.stacked(f"exact/{scorer}", validated)
        for place, budget in enumerate(settings.exact):
            if budget < settings.reach:
                own = exact[..., place]
                found["budgets"][f"{scorer}@{budget}f"] = _measures(
                    reduced, validated, scorer, budget, own
                )
    if settings.exact and (least := settings.exact[0]) < settings.reach:
        scorer = settings.scorers[0]
        exact = _flat(reduced.stacked(f"exact/{scorer}", validated)[..., 0])
        found |= _gate(found["budgets"][f"{scorer}@{least}f"], settings.probes)
        found["gate_at"] = least
        nearest = min(settings.exact, key=lambda own: abs(own - mean))
        at = found["budgets"].get(f"{scorer}@{nearest}f", {}).get("gn")
        found["nearest"] = at and {"frames": nearest, "spearman": at["spearman"]}
        zero = _flat(reduced.stacked("zero", validated))
        found["spearman_zero_history"] = _triple(rank_correlation(zero, exact))
    else:
        found |= {"gate": None, "why": "no budget below the reach was measured exactly"}
    return found


def _measures(
    reduced: Reduced, validated: Sequence[str], scorer: str, budget: int, exact: Tensor
) -> dict[str, Any]:
    """Rank correlations of every cheap measure with exact losses ``[P, L, H]`` at one budget."""
    own, found = _flat(exact), {}
    place = budget - reduced.settings.sink
    for metric in ("gn", "output", "mass"):
        if not reduced.has(f"{scorer}/{metric}"):
            continue
        cheap = _flat(reduced.stacked(f"{scorer}/{metric}", validated)[..., place])
        both, halves = rank_correlation(cheap, own), (split_half(cheap), split_half(own))
        found[metric] = {
            "spearman": _triple(both),
            "why": both.why,
            "reliability": halves[0].value,
            "reliability_exact": halves[1].value,
            "disattenuated": disattenuated(both, *halves),
        }
    if "gn" in found:
        cheap = _flat(reduced.stacked(f"{scorer}/gn", validated)[..., place]).mean(0)
        there = (cheap > 0) & (own.mean(0) > 0)
        ratio = np.log(cheap[there] / own.mean(0)[there])
        found["gn"]["median_abs_log_ratio"] = (
            float(np.median(np.abs(ratio))) if len(ratio) else None
        )
    return found


def _gate(measures: dict[str, Any], probes: int) -> dict[str, Any]:
    """What the correlation of probes with exact losses allows."""
    if not probes:
        return {"gate": "exact", "why": "there are no probes"}
    triple, why = measures["gn"]["spearman"], measures["gn"]["why"]
    low = triple[1]
    gate = None if low is None else next(name for least, name in GATES if low >= least)
    return {"spearman_gn_exact": triple, "gate": gate, "why": why}


def sentences_of(checks: dict[str, Any]) -> list[str]:
    """What the checks say, in sentences."""
    if not checks["validated"]:
        return ["Nothing was measured exactly (validate 0): how good the probes are is not known."]
    on = several(len(checks["validated"]), "prompt")
    if "spearman_gn_exact" not in checks:
        return [f"Probes were not compared with exact losses: {checks['why']}."]
    middle, low, high = checks["spearman_gn_exact"]
    if middle is None or low is None:
        more = f" Validate on {LEAST} prompts or more." if len(checks["validated"]) < LEAST else ""
        shown = "none" if middle is None else number(middle)
        return [f"Rank correlation of probes with exact losses: {shown}, {checks['why']}.{more}"]
    said = {
        "probes": "probes will do",
        "screen": f"probes tell roughly; where gains are close, {WAY}",
        "exact": f"probes do not rank these heads: {WAY}",
    }[checks["gate"]]
    where = f"{checks['gate_at']} frames left" if checks["gate_at"] else "no history"
    found = (
        f"Rank correlation of probes with exact losses across heads, {where}: {number(middle)} "
        f"(95 % interval {number(low)} to {number(high)}, {on}): {said}."
    )
    zero, near = checks["spearman_zero_history"][0], checks["nearest"]
    if near and near["frames"] != checks["gate_at"] and near["spearman"][1] is not None:
        middle, low, high = map(number, near["spearman"])
        found += f" With {near['frames']} frames left: {middle} ({low} to {high})."
    more = [] if zero is None else [f"Of losses without whole heads with the same: {number(zero)}."]
    floor = f"A row that changes nothing changes the estimate by {number(checks['floor'])} at most."
    return [found, *more, floor]


def structure(curves: HeadCurves, scorer: str, metric: str) -> dict[str, Any]:
    """Whether heads differ at all: share of them surely off the median, how well ranks repeat."""
    least = _flat(curves.prompts(scorer, metric)[..., 0])
    return {
        "off_median": share_off_median(least),
        "reliability": split_half(least).value,
        "scorer": scorer,
        "metric": metric,
    }


def looks(
    curves: HeadCurves, order: Sequence[int], scorer: str, metric: str, mean: float
) -> list[Look]:
    """The stopping rule at the fixed numbers of prompts below what there is, and at all of them.

    Args:
        curves: Of all prompts.
        order: Places of the prompts in the curves, in the order in which they were asked for.
        scorer: Whose curves.
        metric: Which.
        mean: Budget that is asked about, history frames per head.
    """
    prompts = curves.prompts(scorer, metric)
    count, layers, heads, size = prompts.shape
    solve, even = _solver(curves.budgets, (layers, heads), mean)
    every = prompts[list(order)].reshape(count, layers * heads, size).numpy()
    steps = [own for own in LOOKS if own < count] + [count]
    return [look(every[:own], solve, even) for own in steps]


def _solver(
    grid: tuple[int, ...], shape: tuple[int, int], mean: float
) -> tuple[Solve, NDArray[np.int64]]:
    """The exact rule on shrunken curves, and uniform budgets, as places on the grid."""

    def solve(curves: NDArray[np.float64]) -> NDArray[np.int64]:
        own = torch.from_numpy(np.ascontiguousarray(curves)).unflatten(1, shape)
        of = limited(grid, shrunken(*summed_up(own)), None, None, None)
        return allocate("optimal", mean, of).flatten().numpy() - grid[0]

    of = limited(grid, torch.zeros(*shape, len(grid), dtype=torch.float64), None, None, None)
    return solve, allocate("uniform", mean, of).flatten().numpy() - grid[0]


def plain(found: Look) -> dict[str, Any]:
    """A look as the file has it."""
    names = ("prompts", "verdict", "regret", "error", "in_sample", "gain", "gain_low", "gain_high")
    change = None if found.change is None else list(found.change)
    return {name: getattr(found, name) for name in names} | {"change": change}


def advice(last: Look, mean: float) -> list[str]:
    """What follows from the last look: enough, how many more, or uniform."""
    found = [f"At a mean of {mean:g} frames: {last.words}"]
    if last.verdict == "table":
        return [*found, "That is enough: no more prompts are needed."]
    if last.verdict == "more prompts" and (next_one := next_look(last.prompts)):
        more = next_one - last.prompts
        return [*found, f"Measure {several(more, 'prompt')} more: --prompts {next_one}."]
    return found


def _flat(values: Tensor) -> NDArray[np.float64]:
    """``[P, M]``."""
    return values.double().flatten(1).numpy()


def _triple(found: Correlation) -> list[float | None]:
    return [found.estimate, found.low, found.high]


def warn_few(validated: int) -> None:
    """Say that so few prompts give no interval."""
    if 0 < validated < LEAST:
        warnings.warn(
            f"Validation on {several(validated, 'prompt')} gives no interval of the rank "
            f"correlation. Give --validate {LEAST} or more; 8 are better than 4.",
            stacklevel=2,
        )
