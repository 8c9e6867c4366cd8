"""The proof of :mod:`lightning_kv.stats.proof` for scores, whose differences count, not ratios.

A share such as recall is better when it is higher and may be 0: there is no ratio. The same tests
run on the differences of prompts: signs are flipped, intervals are BCa's, and P values are adjusted
for the size of the family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_kv.stats.bootstrap import finite
from lightning_kv.stats.comparison import Comparison, Losses, compare
from lightning_kv.stats.inference import holm
from lightning_kv.stats.proof import (
    ALPHA,
    FAMILY,
    Placebo,
    ProofVerdict,
    against,
    fewest_prompts,
    judge,
    placebo,
    placebo_words,
)
from lightning_kv.utilities.formatting import number, several, upper


@dataclass(frozen=True)
class Difference:
    """One condition against another on the prompts that both have.

    Args:
        condition: What is judged.
        against: What it is compared with.
        prompts: Number of prompts.
        gain: Mean difference of the score; above 0 the condition is better.
        low: Lower end of its 95 % interval, by BCa; None for one prompt.
        high: Upper end.
        p: Two-sided, by flipping signs: exact up to 15 prompts.
        wilcoxon: Two-sided, by Wilcoxon's signed ranks.
    """

    condition: str
    against: str
    prompts: int
    gain: float
    low: float | None
    high: float | None
    p: float
    wilcoxon: float


@dataclass(frozen=True)
class ScoreProof:
    """The held-out comparison of budgets by head, in one score.

    Args:
        condition: The budgets that are judged.
        comparisons: With each member of the family, the first of which is uniform.
        adjusted: P values of these, adjusted for their number (Holm), in the same order.
        placebo: Against the same budgets dealt to other heads, differences in place of log-ratios;
            None without shuffles.
        absent: Members of the family that were not measured.
        fewest: Prompts that the tests need at least, whatever the effect.
        margin: A gain below it is not worth having; None where nobody says.
        verdict: As of :class:`~lightning_kv.stats.proof.Proof`; ``uniform`` where a gain of the
            margin is excluded.
        words: The verdict and what it rests on, a sentence each.
    """

    condition: str
    comparisons: tuple[Difference, ...]
    adjusted: tuple[float, ...]
    placebo: Placebo | None
    absent: tuple[str, ...]
    fewest: int
    margin: float | None
    verdict: ProofVerdict
    words: tuple[str, ...]


def prove_score(
    values: Mapping[str, Losses],
    higher_is_better: bool = True,
    condition: str = "optimal",
    family: Sequence[str] = FAMILY,
    shuffles: Sequence[str] = (),
    margin: float | None = None,
    seed: int = 0,
) -> ScoreProof:
    """The verdict on budgets by head, from a score on prompts that did not choose them.

    Args:
        values: By condition and prompt, one number or one per seed.
        higher_is_better: Whether more is better.
        condition: The budgets that are judged.
        family: What they are tested against; the first decides and must be there.
        shuffles: Conditions with the same budgets dealt to other heads.
        margin: The gain that would be worth having.
        seed: The same seed gives the same figures.

    Raises:
        ValueError: As in :func:`~lightning_kv.stats.comparison.compare`; or the family is empty.

    Example:
        >>> own, other = dict.fromkeys("abcdef", 0.9), dict.fromkeys("abcdef", 0.8)
        >>> found = prove_score({"optimal": own, "uniform": other}, family=("uniform",))
        >>> round(found.comparisons[0].gain, 6), found.verdict
        (0.1, 'optimal')
    """
    if not family:
        raise ValueError("The family of comparisons is empty. Name one, such as 'uniform'.")
    losses = as_losses(values, higher_is_better)
    there = [name for name in family if name in losses or name == family[0]]
    found = tuple(difference(losses, condition, name, seed) for name in there)
    adjusted = tuple(holm([own.p for own in found]))
    control, fewest = placebo(losses, condition, shuffles, seed), fewest_prompts(len(there))
    first, absent = found[0], tuple(name for name in family if name not in there)
    gained = adjusted[0] <= ALPHA and first.gain > 0
    excluded = margin is not None and first.high is not None and first.high < margin
    verdict = judge(gained, excluded and first.prompts >= fewest, control)
    said = [
        headline(first, adjusted[0], verdict, fewest, margin),
        *(
            against(own, p, own.gain > 0, figures(own, p))
            for own, p in zip(found[1:], adjusted[1:], strict=True)
        ),
        placebo_words(control, condition, "are better than") if gained else "",
        f"Not measured, so not compared with: {', '.join(absent)}." if absent else "",
    ]
    words = tuple(filter(None, said))
    return ScoreProof(condition, found, adjusted, control, absent, fewest, margin, verdict, words)


def as_losses(values: Mapping[str, Losses], higher_is_better: bool) -> dict[str, Losses]:
    """Losses whose log-ratios are the differences of scores, lower being better.

    Exponentials, of scores less the mean of all, so that none of them overflows.
    """
    sides = {
        name: {prompt: finite(np.atleast_1d(own)) for prompt, own in side.items()}
        for name, side in values.items()
    }
    every = [own for side in sides.values() for own in side.values()]
    middle = float(np.concatenate(every).mean()) if every else 0.0
    sign = -1 if higher_is_better else 1
    return {
        name: {prompt: np.exp(sign * (own - middle)).tolist() for prompt, own in side.items()}
        for name, side in sides.items()
    }


def difference(
    losses: Mapping[str, Losses], condition: str, other: str, seed: int = 0
) -> Difference:
    """A comparison of such losses, as one of scores.

    Args:
        losses: From :func:`as_losses`.
        condition: What is judged.
        other: What it is compared with.
        seed: The same seed gives the same interval and p value.
    """
    found: Comparison = compare(losses, condition, other, seed)
    ends = (None, None)
    if found.low is not None:
        ends = (-math.log(found.high), -math.log(found.low))
    return Difference(
        condition, other, found.prompts, -found.change, *ends, found.p, found.wilcoxon
    )


def figures(found: Difference, p: float) -> str:
    """Difference, interval and p value.

    Args:
        found: The comparison.
        p: Its p value, adjusted.
    """
    ends = "no interval"
    if found.low is not None:
        ends = f"95 % interval {signed(found.low)} to {signed(found.high)}"
    return f"{signed(found.gain)} ({ends}, p {number(p)})"


def signed(value: float) -> str:
    """A difference, with its sign.

    >>> signed(0.0123456), signed(-0.0)
    ('+0.0123', '+0')
    """
    return f"{value + 0.0:+.3g}"


def headline(
    first: Difference,
    adjusted: float,
    verdict: ProofVerdict,
    fewest: int,
    margin: float | None,
) -> str:
    """The verdict against uniform budgets."""
    seen = (
        f"{first.condition} budgets gain {figures(first, adjusted)} on {first.against} ones on "
        f"{several(first.prompts, 'held-out prompt')}"
    )
    if verdict in ("optimal", "spread"):
        return f"{upper(first.condition)} is better than {first.against}: {seen}."
    if verdict == "uniform":
        return (
            f"{upper(first.against)} is enough here: {seen}, so a gain of {number(margin)} is "
            "excluded."
        )
    short = f" No effect can be shown on fewer than {fewest} prompts." * (first.prompts < fewest)
    return f"Undecided: {seen}.{short}"
