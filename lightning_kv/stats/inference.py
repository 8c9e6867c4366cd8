"""Is a policy worse: tests over prompts, and how many prompts they need.

The unit is the prompt: one value per prompt and policy, and differences between two policies on
the same prompts. Where prompts have several seeds, :func:`prompt_means` comes before anything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import nctdtrinc, stdtrit

from lightning_kv.stats.bootstrap import (
    Array,
    MeanConfidence,
    ceiling,
    check_level,
    confidence_below,
    finite,
)

EXACT = 15
"""Up to so many differences all ``2**n`` signs are tried; beyond, random ones."""

Alternative = Literal["two-sided", "greater", "less"]
Verdict = Literal["not worse", "worse", "unclear"]


def prompt_means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """One value per prompt from one per seed: call it before every other function here.

    Seeds of one prompt are not independent clips. Taken as such, they make intervals too narrow;
    the mean over them is one value of the prompt, and its spread holds that of both levels.

    Args:
        values: A prompt's values, one per seed, by prompt.

    Raises:
        ValueError: A prompt has no value, or one that is not finite.

    Example:
        >>> prompt_means({"a boat": [1.0, 3.0], "a cat": [4.0]})
        {'a boat': 2.0, 'a cat': 4.0}
    """
    empty = [prompt for prompt, seeds in values.items() if not len(seeds)]
    if empty:
        raise ValueError(
            f"A mean needs a value, but {len(empty)} of {len(values)} prompts have none, such as "
            f"{empty[0]!r}. Leave these prompts out."
        )
    return {prompt: float(finite(seeds).mean()) for prompt, seeds in values.items()}


def jackknife(
    values_by_unit: ArrayLike, statistic: Callable[[Array], float] = np.mean
) -> tuple[float, float | None]:
    """A statistic of all units, and its standard error from leaving out one at a time.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, eq. 11.5. Safe for Frechet
    distances and differences of them, which the bootstrap inflates: a set with repeated clips has
    a lower rank.

    Args:
        values_by_unit: Shape [units, ...]; for a paired statistic, a unit holds both sides.
        statistic: From such an array, of any number of units, to a number. The mean has a closed
            form, which is used.

    Returns:
        The estimate, and its standard error; None in its place for fewer than two units.

    Raises:
        ValueError: There is no unit, a value is not finite, or the statistic is not.

    Example:
        >>> jackknife([1.0, 2.0, 3.0])
        (2.0, 0.5773502691896258)
        >>> jackknife([1.0, 2.0, 5.0], np.max)
        (5.0, 2.0)
    """
    values = np.atleast_1d(finite(values_by_unit))
    n = len(values)
    if not n:
        raise ValueError("A statistic of nothing was asked for: 0 units. Pass one unit or more.")
    estimate = float(finite(statistic(values)))
    if n < 2:
        return estimate, None
    if statistic is np.mean:
        return estimate, float(values.reshape(n, -1).mean(1).std(ddof=1)) / math.sqrt(n)
    left_out = finite([float(statistic(np.delete(values, unit, 0))) for unit in range(n)])
    return estimate, math.sqrt((n - 1) * left_out.var())


def sign_flip_p(
    differences: Sequence[float],
    alternative: Alternative = "two-sided",
    permutations: int = 10_000,
    seed: int = 0,
) -> float | None:
    """P value of "these two policies are the same", by swapping them on random prompts.

    If the policies are exchangeable, each difference was as likely of the other sign. The statistic
    is the mean. Up to 15 prompts all signs are tried and the p value is exact; beyond, it is
    ``(b + 1) / (m + 1)`` from m random ones of which b are as extreme (Phipson and Smyth, 2010,
    arXiv 1603.05766), which is never 0 and never too small.

    Args:
        differences: One number per prompt.
        alternative: ``greater`` looks for a mean above 0, ``less`` for one below.
        permutations: Number of random sign patterns, for more than 15 prompts.
        seed: The same seed gives the same p value.

    Returns:
        Above 0, at most 1, and 1 where all differences are 0; None without differences.

    Raises:
        ValueError: A difference is not finite, or the alternative is not known.

    Example:
        >>> sign_flip_p([1.0] * 6), sign_flip_p([1.0] * 6, "greater")
        (0.03125, 0.015625)
    """
    data = finite(differences)
    if alternative not in ("two-sided", "greater", "less"):
        raise ValueError(
            f"There is no alternative {alternative!r}. Pass 'two-sided', 'greater' or 'less'."
        )
    if not len(data):
        return None
    exact = len(data) <= EXACT
    sums = all_sums(data) if exact else random_signs(len(data), permutations, seed) @ data
    seen = data.sum()
    if alternative == "less":
        sums, seen = -sums, -seen
    elif alternative == "two-sided":
        sums, seen = np.abs(sums), abs(seen)
    extreme = int((sums >= seen - 1e-12 * np.abs(data).sum()).sum())  # equal sums round apart
    return extreme / len(sums) if exact else (extreme + 1) / (permutations + 1)


def all_sums(data: Array) -> Array:
    """Sums under all signs: [2**n]."""
    sums = np.zeros(1)
    for value in data:
        sums = np.concatenate([sums + value, sums - value])
    return sums


@lru_cache(maxsize=2)
def random_signs(n: int, permutations: int, seed: int) -> Array:
    """Random signs: [permutations, n], the same for all data."""
    signs = 2.0 * np.random.default_rng(seed).integers(0, 2, (permutations, n)) - 1
    signs.setflags(write=False)
    return signs


@dataclass(frozen=True)
class NonInferiority:
    """How the mean loss lies to the margin.

    Args:
        n: Number of prompts.
        mean: Mean loss; positive is worse.
        margin: The most that is allowed.
        level: Of each bound, one-sided.
        lower: The mean loss lies above it with this confidence; None where so few prompts cannot
            give that confidence.
        upper: The mean loss lies at or below it with this confidence; None as above.
        p: P value of "the mean loss is beyond the margin": 1 - the confidence that it is not.
        verdict: ``not worse`` where the upper bound is within the margin, ``worse`` where the lower
            one is beyond it, else ``unclear``.
    """

    n: int
    mean: float
    margin: float
    level: float
    lower: float | None
    upper: float | None
    p: float
    verdict: Verdict


def non_inferiority(
    losses: Sequence[float],
    margin: float,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> NonInferiority | None:
    """Whether a policy is worse than the reference by no more than a margin.

    The test is one-sided, by the bootstrap over prompts: BCa, widened for few prompts, see
    :class:`~lightning_kv.stats.bootstrap.MeanConfidence`. "Not worse" is said just where
    :func:`~lightning_kv.stats.bootstrap.confidence_below` reaches the level. Both verdicts
    are capped by the sign test, :func:`~lightning_kv.stats.bootstrap.ceiling`: 1 to 4 prompts
    are always "unclear" at 95 %, however well they agree, and identical losses at most give
    ``0.5**n`` for p.

    Where losses spread evenly to both sides, a loss at the margin is called "not worse" as rarely
    as the level says. A few prompts do not show failures that are rare: with exponential losses
    that happens in 12 % of all tests on 8 prompts, 8 % on 16 and 32, 6 % on 64; where one prompt in
    five loses, in 25 % on 8, 10 % on 16 and 5 % on 32 (``tools/simulate_statistics.py``).

    Args:
        losses: One number per prompt, against the reference; positive is worse.
        margin: The most that the mean may be, in the unit of the losses.
        level: Confidence that a verdict needs.
        resamples: Number of bootstrap samples.
        seed: The same seed gives the same verdict.

    Returns:
        None without losses.

    Raises:
        ValueError: A loss or the margin is not finite, or the level is not between 0 and 1.

    Example:
        >>> found = non_inferiority([0.01, 0.0, -0.01, 0.02, 0.0, 0.01], margin=0.02)
        >>> found.verdict, round(found.upper, 4)
        ('not worse', 0.0133)
        >>> non_inferiority([0.0] * 4, margin=0.02).verdict
        'unclear'
    """
    data = finite(losses)
    check_margin(margin)
    if not len(data):
        return None
    confidence = confidence_below(data, margin, resamples, seed)
    lower = upper = None
    if ceiling(len(data)) >= check_level(level):
        upper = MeanConfidence(data, resamples, seed).upper(level)
        lower = -MeanConfidence(-data, resamples, seed).upper(level)
    beyond = lower is not None and lower > margin
    return NonInferiority(
        n=len(data),
        mean=float(data.mean()),
        margin=margin,
        level=level,
        lower=lower,
        upper=upper,
        p=1 - confidence,
        verdict="not worse" if confidence >= level else "worse" if beyond else "unclear",
    )


def check_margin(margin: float) -> None:
    """Refuse a margin that is no number.

    Raises:
        ValueError: It is not finite.
    """
    if not math.isfinite(margin):
        raise ValueError(f"A margin of {margin} says nothing. Pass a finite number, such as 0.02.")


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values adjusted for their number: reject those at or below 0.05 and err in 5 % of families.

    Holm, "A simple sequentially rejective multiple test procedure", 1979. Holds whatever the
    dependence between the tests. What has no p value (None) keeps none, and does not count.

    Raises:
        ValueError: A p value is not between 0 and 1.

    Example:
        >>> holm([0.01, None, 0.04, 0.03])
        [0.03, None, 0.06, 0.06]
    """
    known = [place for place, p in enumerate(p_values) if p is not None]
    wrong = [p_values[place] for place in known if not 0 <= p_values[place] <= 1]
    if wrong:
        raise ValueError(f"{wrong[0]} is no p value. Pass numbers from 0 to 1, or None.")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(known, key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def effect_size(differences: Sequence[float]) -> float | None:
    """Cohen's d_z: mean of paired differences ÷ their standard deviation (n - 1).

    Returns:
        None for fewer than two differences, or where all are the same.

    Raises:
        ValueError: A difference is not finite.

    Example:
        >>> effect_size([1.0, 2.0, 3.0])
        2.0
    """
    data = finite(differences)
    spread = deviation(data)
    return float(data.mean()) / spread if spread else None


def prompts_needed(
    losses: Sequence[float], margin: float, power: float = 0.8, level: float = 0.95
) -> int | None:
    """How many prompts in all would show that the loss is within the margin.

    If the true mean and spread are those of these losses, and losses are about normal: the
    non-central t distribution (Student's one-sided test, which :func:`non_inferiority` comes
    close to).

    Args:
        losses: One number per prompt, against the reference; positive is worse.
        margin: The most that the mean may be, in the unit of the losses.
        power: Chance that the test says "not worse".
        level: Confidence of the test.

    Returns:
        At least as many as :func:`~lightning_kv.stats.bootstrap.ceiling` asks for. None where
        the mean is beyond the margin, or at it with a spread, since no number would do; None for
        fewer than two losses, which have no spread.

    Raises:
        ValueError: A loss or the margin is not finite, or level or power is out of range.

    Example:
        >>> prompts_needed([0.01, 0.0, -0.01, 0.02, 0.0, 0.01], margin=0.015)
        9
        >>> prompts_needed([0.03, 0.04], margin=0.02) is None
        True
    """
    data = finite(losses)
    check_margin(margin)
    if len(data) < 2:
        return None
    spread, gap = deviation(data), margin - float(data.mean())
    if gap < 0 or (spread and not gap):
        return None
    least = max(2, math.ceil(-math.log2(1 - check_level(level))))
    enough, low, high = gap / spread if spread else math.inf, least - 1, least
    while shift(high, power, level) > enough:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if shift(middle, power, level) > enough else (low, middle)
    return high


def detectable(losses: Sequence[float], power: float = 0.8, level: float = 0.95) -> float | None:
    """The smallest difference that so many prompts of this spread can show, one-sided.

    The other side of :func:`prompts_needed`: with a margin so far above the mean, it asks for the
    prompts that there are.

    Args:
        losses: One number per prompt; only their number and their spread count.
        power: Chance that the test sees it.
        level: Confidence of the test.

    Returns:
        In the unit of the losses; None for fewer prompts than the level needs (5 at 95 %).

    Raises:
        ValueError: A loss is not finite, or level or power is out of range.

    Example:
        >>> round(detectable([0.01, 0.0, -0.01, 0.02, 0.0, 0.01]), 4)
        0.0124
    """
    data = finite(losses)
    if len(data) < 2 or ceiling(len(data)) < check_level(level):
        return None
    return deviation(data) * shift(len(data), power, level)


def shift(n: int, power: float, level: float) -> float:
    """The mean, in standard deviations, that n values show to be above 0 with this power.

    Raises:
        ValueError: The power is not between that of chance, 1 - level, and 1.
    """
    if not 1 - level < power < 1:
        raise ValueError(
            f"A power of {power} cannot be planned for: a test at level {level} reaches "
            f"{1 - level:g} by chance, and none is certain. Pass one between, such as 0.8."
        )
    return float(nctdtrinc(n - 1, 1 - power, stdtrit(n - 1, level))) / math.sqrt(n)


def deviation(data: Array) -> float:
    """Standard deviation (n - 1); exactly 0 where all values are the same, or there is one."""
    return float(data.std(ddof=1)) if len(data) > 1 and np.ptp(data) else 0.0
