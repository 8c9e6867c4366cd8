"""A map of head budgets, what it can gain over uniform ones, and how sure that is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_kv.policies.allocation import Knobs, uniform
from lightning_kv.policies.budget.calibrated import least_of
from lightning_kv.policies.curve_statistics import (
    Bootstrap,
    am_gm,
    each_frame,
    gini,
    loss_of,
    resampled,
    undecided,
)
from lightning_kv.policies.curve_tables import Reading
from lightning_kv.policies.head_curves import HeadCurves
from lightning_kv.policies.registry import discover
from lightning_kv.utilities.formatting import number, percent, several

BY_GAIN = ("optimal", "greedy")
"""Rules that have a threshold: the gain of the last frame."""

KNOBS = Knobs()

TOTALS = "focused"
"""A rule whose total is an outcome, so that other prompts would choose another one."""

WORTH = 0.02
"""Share of a loss that is worth a word."""

ENOUGH = 3
"""Prompts for a judgement out of bag."""


@dataclass(frozen=True)
class BudgetMap:
    """Solved budgets, and what is predicted of them.

    Args:
        rule: Of the allocation.
        reading: Which curves, in words.
        prompts: Number of prompts.
        budgets: Frames of each head, a row per layer.
        mean: Of the budgets.
        layer_means: Of each layer.
        gini: 0 where all are the same.
        padded: Frames that they take if each layer is stored as long as its longest head, over
            those they hold.
        in_sample: Predicted loss over that of uniform budgets, on the prompts it was solved on;
            None where uniform ones lose nothing.
        out_of_bag: The same on prompts that were not drawn: median, and 5th and 95th percentile of
            the resamples; None where it cannot be judged.
        sure: Whether the 95th percentile is below 1.
        regret: 90th percentile of the share of the in-sample gain that resampled budgets miss.
        am_gm: Arithmetic over geometric mean of the importances; None where a head has none.
        threshold: What the last frame gains (lambda*); None where the rule has no such thing.
        undecided: Layer and head, from 0, of those whose gain is within 2 standard errors of it.
        capped: Heads that get all that was measured.
        left: What they still lose together there, over what they lose with the least.
    """

    rule: str
    reading: str
    prompts: int
    budgets: tuple[tuple[int, ...], ...]
    mean: float
    layer_means: tuple[float, ...]
    gini: float
    padded: float
    in_sample: float | None
    out_of_bag: tuple[float, float, float] | None
    sure: bool | None
    regret: float | None
    am_gm: float | None
    threshold: float | None
    undecided: tuple[tuple[int, int], ...] | None
    capped: int = 0
    left: float = 0.0


def read_frames(text: str, name: str, whole: bool = False) -> float:
    """Frames from ``5f``, ``5`` or ``5.5f``.

    >>> read_frames("5f", "mean"), read_frames("5.5", "mean")
    (5.0, 5.5)

    Raises:
        ValueError: It is no number of frames.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)f?", text.strip())
    if not found or (whole and float(found[1]) % 1):
        kind, way = ("whole number", "4f") if whole else ("number", "5f, or 5.5f")
        raise ValueError(
            f"--{name} {text!r} is no {kind} of history frames. Budgets are counted in frames of "
            f"latents. Write {way}."
        )
    return float(found[1])


def budget_map(
    curves: HeadCurves,
    rule: str,
    mean: float,
    how: Reading,
    least: int | None = None,
    most: int | None = None,
    knobs: Knobs = KNOBS,
    resamples: int = 200,
) -> BudgetMap:
    """Solve budgets, and predict what they gain over uniform ones of the same total.

    Args:
        curves: Of the model.
        rule: See :mod:`lightning_kv.policies.allocation`.
        mean: Frames per head; of ``focused`` the most.
        how: Which of the curves.
        least: See :meth:`~lightning_kv.policies.head_curves.HeadCurves.solve`; where None at least
            what the part protects that keeps the frames.
        most: See there.
        knobs: Settings of the rules.
        resamples: Of the prompts.

    Raises:
        ValueError: Something was not measured, or cannot be divided.
    """
    if mean < 1:
        raise ValueError(
            f"--mean {mean:g} is less than a frame, and leaves nothing to divide. A mean is a "
            "number of history frames, no share: give 1 or more, such as 6f."
        )
    if least is None:
        discover()
        geometry = curves.about.get("model", {}).get("geometry", {})
        least = max(curves.budgets[0], least_of(how.scorer, geometry.get("frames_per_chunk", 0)))

    def solved(prompts: Tensor) -> Tensor:
        own = replace(curves, curves={f"{how.scorer}/{how.metric}": prompts})
        asked = (how.scorer, how.metric, how.objective, how.shrink, how.importance)
        return torch.tensor(own.solve(rule, mean, *asked, least, most, knobs))

    prompts, low = curves.prompts(how.scorer, how.metric), curves.budgets[0]
    own = solved(prompts)
    even = uniform(*own.shape, int(own.sum()))
    judged = _judged(curves, prompts, solved, even, resamples) if rule != TOTALS else None
    curve = curves.curve(how.scorer, how.metric, how.objective, how.shrink)
    lines = [each_frame(curves.budgets, x, low, curves.reach) for x in (prompts, curve)]
    last, near = undecided(*lines, own, low) if rule in BY_GAIN else (None, None)
    flat, full = loss_of(lines[0].mean(0), even, low), own == curves.reach
    ends = lines[0].mean(0)[full]  # [heads, K]
    return BudgetMap(
        rule,
        how.words,
        len(prompts),
        tuple(map(tuple, own.tolist())),
        float(own.double().mean()),
        tuple(own.double().mean(1).tolist()),
        gini(own),
        float(own.max(1).values.sum() * own.shape[1] / own.sum()),
        loss_of(lines[0].mean(0), own, low) / flat if flat > 0 else None,
        judged and tuple(map(judged.ratio, (0.5, 0.05, 0.95))),
        judged and judged.sure,
        judged and judged.regret,
        am_gm(curves.important(how.importance, curve)),
        last,
        None if near is None else tuple(map(tuple, near.nonzero().tolist())),
        int(full.sum()),
        float(ends[:, -1].sum() / ends[:, 0].sum()) if full.any() else 0.0,
    )


def _judged(
    curves: HeadCurves, prompts: Tensor, solved: Any, even: Tensor, resamples: int
) -> Bootstrap | None:
    """What becomes of it on prompts that it has not seen; None where nothing can be said."""
    low = curves.budgets[0]
    losses = each_frame(curves.budgets, prompts.mean(0), low, curves.reach)
    if len(prompts) < ENOUGH or min(loss_of(losses, x, low) for x in (even, solved(prompts))) <= 0:
        return None
    return resampled(curves.budgets, prompts, solved, even, resamples)


def sentences(found: BudgetMap, model: str) -> list[str]:
    """What the map says, the most important first."""
    values = sorted({frames for row in found.budgets for frames in row})
    sizes = f"{several(len(found.budgets), 'layer')} of {several(len(found.budgets[0]), 'head')}"
    told = [
        _verdict(found),
        f"{found.rule} budgets of {found.mean:g} history frames on average for "
        f"{model or 'a model without a name'} ({sizes}): {len(values)} different ones from "
        f"{values[0]} to {values[-1]}, Gini {number(found.gini)}. Curves: {found.reading}, "
        f"{several(found.prompts, 'prompt')}.",
    ]
    if found.in_sample is not None:
        told.append(
            f"Predicted loss on the prompts they were solved on: {number(found.in_sample)} of "
            "uniform budgets' (too good: they were chosen on these)."
        )
    if found.out_of_bag is not None:
        middle, *ends = map(number, found.out_of_bag)
        missed = (
            ""
            if found.regret is None
            else (
                f" Nine of ten resamples miss at most {percent(found.regret)} of the gain on all "
                "prompts."
            )
        )
        told.append(
            f"On prompts they were not solved on: {middle} [{', '.join(ends)}] of uniform "
            f"budgets' (median, 5th and 95th percentile of resamples).{missed}"
        )
    told.append(_spread(found))
    told.append(
        "If each layer were stored as long as its longest head, they would take "
        f"{found.padded:.2f} times what they hold."
    )
    if found.left > WORTH:
        told.append(
            f"{several(found.capped, 'head')} get all that was measured, and still lose "
            f"{percent(found.left)} of what they lose with the least: a larger reach may give more."
        )
    return told + _margin(found)


def _verdict(found: BudgetMap) -> str:
    """Whether a table is worth it."""
    if found.sure:
        return f"Better than uniform budgets on prompts that {found.rule} ones have not seen."
    if found.rule == TOTALS:
        return (
            "Not judged on other prompts: those would choose another total. focused-matched has "
            "its shape and the total that is asked for."
        )
    if found.out_of_bag is None:
        return (
            f"Not judged: that takes {ENOUGH} prompts or more, and budgets under which something "
            "is lost."
        )
    if found.out_of_bag[1] > 1:
        return f"Worse than uniform budgets on prompts that {found.rule} ones have not seen."
    return (
        f"Uniform is enough here: on prompts that {found.rule} budgets have not seen, these are "
        "not surely better."
    )


def _spread(found: BudgetMap) -> str:
    """How much can be gained at all."""
    if found.am_gm is None:
        return "A head loses nothing at the least budget, so AM/GM bounds no gain."
    return (
        f"AM/GM of the importances is {found.am_gm:.4g}: if all heads decayed alike, uniform "
        "budgets would lose so many times the least there is."
    )


def _margin(found: BudgetMap) -> list[str]:
    """Heads that were given or refused a frame by a hair."""
    if found.threshold is None or found.undecided is None:
        return []
    count = len(found.budgets) * len(found.budgets[0])
    shown = ", ".join(f"{layer + 1}.{head + 1}" for layer, head in found.undecided[:12])
    more = " and others" if len(found.undecided) > 12 else ""
    which = f": layer.head {shown}{more}" if found.undecided else ""
    return [
        f"The last frame gains {number(found.threshold)} (lambda*); {len(found.undecided)} of "
        f"{several(count, 'head')} may as well have one more or one less, within 2 standard "
        f"errors{which}."
    ]


def rows(found: BudgetMap) -> Sequence[tuple[int, tuple[int, ...], float]]:
    """Layers from 1 on, with their budgets and their mean."""
    pairs = zip(found.budgets, found.layer_means, strict=True)
    return [(layer, own, mean) for layer, (own, mean) in enumerate(pairs, 1)]
