"""Two conditions on the same prompts, as a ratio of losses: how large, how sure, how many more.

The unit is the prompt. Its value is the mean over seeds (and sites) of the *logarithm* of the
ratio, that is, the ratio of geometric means: a loss is of another size on every prompt and site, so
it is the ratio that is alike, and one seed whose losses are ten times those of the others counts no
more than they do. Differences of scores are averaged as they are, see
:func:`~lightning_kv.stats.inference.prompt_means`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import wilcoxon

from lightning_kv.stats.bootstrap import Array, bca_interval, check_level, finite
from lightning_kv.stats.inference import (
    detectable,
    deviation,
    effect_size,
    prompt_means,
    sign_flip_p,
)
from lightning_kv.utilities.formatting import number, several

FLIPS = 20_000
"""Random sign patterns, for more than 15 prompts."""
WORTH = 0.1
"""The share of the loss that a condition should save to be worth having."""

Losses = Mapping[str, "float | Sequence[float]"]
"""By prompt: one number, or one for each seed."""


@dataclass(frozen=True)
class Comparison:
    """One condition against another on the prompts that both have.

    Args:
        condition: What is judged.
        against: What it is compared with.
        prompts: Number of prompts.
        left_out: Prompts that only one of the two has.
        change: Mean log-ratio of losses; below 0 the condition is better.
        ratio: ``exp(change)``.
        low: Lower end of the 95 % interval of the ratio, by BCa; None for one prompt.
        high: Upper end.
        p: Two-sided, by flipping signs: exact up to 15 prompts.
        wilcoxon: Two-sided, by Wilcoxon's signed ranks: a check, as few prompts cannot sway it.
        spread: Standard deviation of the log-ratios (n - 1).
        effect: Mean ÷ spread of the log-ratios (Cohen's d_z); None without a spread.
        needed: Prompts that would show a loss lower by 10 % (power 80 %, two-sided 5 %), if they
            spread so; None without a spread.
        detectable: Share by which so many prompts can show a loss to be lower, at that power; None
            where they are too few.
    """

    condition: str
    against: str
    prompts: int
    left_out: tuple[str, ...]
    change: float
    ratio: float
    low: float | None
    high: float | None
    p: float
    wilcoxon: float
    spread: float
    effect: float | None
    needed: int | None
    detectable: float | None


def compare(
    losses: Mapping[str, Losses], condition: str, against: str, seed: int = 0
) -> Comparison:
    """The ratio of two conditions' losses, paired by prompt and seed.

    Args:
        losses: By condition and prompt, each one number above 0 or one per seed; the seeds of a
            prompt are the same, in the same order, under all conditions.
        condition: What is judged.
        against: What it is compared with.
        seed: The same seed gives the same interval and p value.

    Raises:
        ValueError: A condition is missing, the two share no prompt, a prompt has not as many seeds
            under both, or a loss is not finite and above 0.

    Example:
        >>> own, other = {"cat": [1.0, 2.0], "dog": 3.0}, {"cat": [2.0, 4.0], "dog": 6.0}
        >>> found = compare({"optimal": own, "uniform": other}, "optimal", "uniform")
        >>> round(found.ratio, 6), found.p
        (0.5, 0.5)
    """
    values, left_out = log_ratios(losses, condition, against)
    ends = bca_interval(values.tolist(), seed=seed)
    low, high = (None, None) if ends is None else map(math.exp, ends)
    change, spread = float(values.mean()), deviation(values)
    least = detectable(values.tolist(), level=0.975)
    return Comparison(
        condition=condition,
        against=against,
        prompts=len(values),
        left_out=left_out,
        change=change,
        ratio=math.exp(change),
        low=low,
        high=high,
        p=sign_flip_p(values.tolist(), permutations=FLIPS, seed=seed),
        wilcoxon=signed_ranks(values),
        spread=spread,
        effect=effect_size(values.tolist()),
        needed=prompts_planned(spread, -math.log(1 - WORTH)) if spread else None,
        detectable=None if least is None else 1 - math.exp(-least),
    )


def log_ratios(
    losses: Mapping[str, Losses], condition: str, against: str
) -> tuple[Array, tuple[str, ...]]:
    """Log-ratio of each prompt that both have, by name, and the prompts that only one has.

    Raises:
        ValueError: See :func:`compare`.
    """
    own, other = shared_prompts(losses, condition, against)
    both = sorted(own.keys() & other.keys())
    sides = []
    for name, side in ((condition, own), (against, other)):
        sides.append(prompt_means({prompt: logs(side[prompt], name, prompt) for prompt in both}))
    found = np.array([sides[0][prompt] - sides[1][prompt] for prompt in both])
    # Two ways to the same loss round apart; that is no difference.
    found = np.where(np.abs(found) < 1e-12, 0.0, found)
    return found, tuple(sorted(own.keys() ^ other.keys()))


def shared_prompts(
    values: Mapping[str, Losses], condition: str, against: str
) -> tuple[dict[str, Sequence[float]], dict[str, Sequence[float]]]:
    """Values of two conditions by prompt, one per seed.

    Raises:
        ValueError: A condition is missing, the two share no prompt, or a prompt has not as many
            seeds under both.
    """
    missing = [name for name in (condition, against) if name not in values]
    if missing:
        raise ValueError(
            f"There is nothing of {', '.join(map(repr, missing))}, only of "
            f"{', '.join(sorted(values)) or 'no condition'}. Measure it, or name one of these."
        )
    own, other = (
        {prompt: np.atleast_1d(seeds).tolist() for prompt, seeds in values[name].items()}
        for name in (condition, against)
    )
    both = own.keys() & other.keys()
    if not both:
        raise ValueError(
            f"{condition!r} with {several(len(own), 'prompt')} and {against!r} with "
            f"{len(other)} share none, so they cannot be paired. Measure both on the same prompts."
        )
    uneven = sorted(prompt for prompt in both if len(own[prompt]) != len(other[prompt]))
    if uneven:
        prompt = uneven[0]
        raise ValueError(
            f"Seeds cannot be paired: {prompt!r} has {len(own[prompt])} under {condition!r} and "
            f"{len(other[prompt])} under {against!r}. Pass those that both have, in one order."
        )
    return own, other


def logs(losses: Sequence[float], condition: str, prompt: str) -> list[float]:
    """Logarithms of a prompt's losses.

    Raises:
        ValueError: One is not finite and above 0.
    """
    data = finite(losses)
    if not (data > 0).all():
        raise ValueError(
            f"A ratio needs losses above 0, but that of {condition!r} on {prompt!r} is "
            f"{number(float(data.min()))}. Compare conditions that lose something: the full cache "
            "is what losses are measured from."
        )
    return np.log(data).tolist()


def signed_ranks(values: Array) -> float:
    """Wilcoxon's p value, two-sided; zeros are dropped, and 1 where nothing is left."""
    there = values[values != 0]
    return float(wilcoxon(there).pvalue) if len(there) else 1.0


def prompts_planned(spread: float, change: float, power: float = 0.8, level: float = 0.95) -> int:
    """How many prompts would show a change of the mean log-ratio, two-sided.

    ``n = (z_level + z_power)² spread² / change²``, which is ``7.85 spread² / change²`` for 80 %
    power at 5 %. It takes the spread as known; where it is estimated, two more are needed.

    Args:
        spread: Standard deviation of the log-ratios between prompts.
        change: Mean log-ratio that shall be seen; the sign does not count.
        power: Chance that the test sees it.
        level: Confidence of the test.

    Raises:
        ValueError: The spread is negative, the change 0, or power or level not between 0 and 1.

    Example:
        >>> prompts_planned(0.15, 0.10)
        18
    """
    if spread < 0 or not change or not 0 < power < 1:
        raise ValueError(
            f"No number of prompts can be planned for a spread of {spread}, a change of {change} "
            f"and a power of {power}. Pass a spread of 0 or more, a change other than 0 and a "
            "power between 0 and 1."
        )
    quantiles = ndtri((1 + check_level(level)) / 2) + ndtri(power)
    return max(1, math.ceil((quantiles * spread / change) ** 2 - 1e-9))
