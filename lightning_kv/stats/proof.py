"""Are budgets by head better than uniform ones on held-out prompts: tests, controls, verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_kv.stats.comparison import (
    FLIPS,
    WORTH,
    Comparison,
    Losses,
    compare,
    log_ratios,
    shared_prompts,
)
from lightning_kv.stats.inference import (
    NonInferiority,
    holm,
    non_inferiority,
    prompt_means,
    sign_flip_p,
)
from lightning_kv.utilities.formatting import number, percent, several, upper

FAMILY = ("uniform", "pyramid", "focused-matched", "dynamic")
"""What budgets by head are tested against together, the first of which decides."""
ALPHA = 0.05
"""P values at or below it are effects."""
EXPECTED_P = 0.01
"""The p value that was expected before the first measurement, with a loss lower by ``WORTH``."""

ProofVerdict = Literal["optimal", "spread", "uniform", "unclear"]


@dataclass(frozen=True)
class Placebo:
    """Budgets against themselves, dealt to other heads: does it matter which head gets what?

    Args:
        shuffles: The comparison with each shuffle.
        better: Number of shuffles that lose more on average.
        won: Share of all pairs of shuffle and prompt that the budgets win; ties are halves.
        p: Two-sided sign test over these pairs, in which a prompt's pairs flip together.
        holds: Whether all shuffles lose more, and p is 0.05 or less.
    """

    shuffles: tuple[Comparison, ...]
    better: int
    won: float
    p: float
    holds: bool


@dataclass(frozen=True)
class Quality:
    """A quality metric that must not fall by more than a margin.

    Args:
        metric: Its name.
        condition: What is judged.
        against: What it is compared with.
        found: The test; its losses are what is lost of the metric, one mean over seeds per prompt.
    """

    metric: str
    condition: str
    against: str
    found: NonInferiority


@dataclass(frozen=True)
class Proof:
    """The held-out comparison of budgets by head.

    Args:
        condition: The budgets that are judged.
        comparisons: With each member of the family, the first of which is uniform.
        adjusted: P values of these, adjusted for their number (Holm), in the same order.
        placebo: Against the same budgets dealt to other heads; None without shuffles.
        quality: Metrics that must not fall.
        others: Comparisons beside the family, not adjusted.
        absent: Members of the family that were not measured.
        fewest: Prompts that the tests need at least, whatever the effect.
        verdict: ``optimal``: better than uniform, and by its assignment to heads; ``spread``:
            better than uniform, but its assignment is not shown to matter; ``uniform``: a tenth
            less loss than uniform is excluded; ``unclear``: neither shown nor excluded.
        expected: Whether the loss is lower by 10 % or more with p below 0.01, as was expected.
        words: The verdict and what it rests on, a sentence each.
    """

    condition: str
    comparisons: tuple[Comparison, ...]
    adjusted: tuple[float, ...]
    placebo: Placebo | None
    quality: tuple[Quality, ...]
    others: tuple[Comparison, ...]
    absent: tuple[str, ...]
    fewest: int
    verdict: ProofVerdict
    expected: bool
    words: tuple[str, ...]


def prove(
    losses: Mapping[str, Losses],
    condition: str = "optimal",
    family: Sequence[str] = FAMILY,
    shuffles: Sequence[str] = (),
    others: Sequence[str] = (),
    quality: Sequence[Quality] = (),
    seed: int = 0,
    expects: bool = True,
) -> Proof:
    """The verdict on budgets by head, from losses on prompts that did not choose them.

    Args:
        losses: By condition and prompt, one number or one per seed, see
            :func:`~lightning_kv.stats.comparison.compare`. All conditions have the same total. A
            loss is a distance such as the relative error of the latents: of squares, changes and
            what is worth having would mean half as much.
        condition: The budgets that are judged.
        family: What they are tested against; the first decides and must be there, the others count
            if they were measured.
        shuffles: Conditions with the same budgets dealt to other heads.
        others: Conditions to compare with beside the family.
        quality: From :func:`keeps_quality`.
        seed: The same seed gives the same figures.
        expects: Also say whether it came as expected; that was said of chunks, not of rollouts.

    Raises:
        ValueError: The family is empty, or as in :func:`~lightning_kv.stats.comparison.compare`.
    """
    if not family:
        raise ValueError("The family of comparisons is empty. Name one, such as 'uniform'.")
    there = [name for name in family if name in losses or name == family[0]]
    comparisons = tuple(compare(losses, condition, name, seed) for name in there)
    adjusted = tuple(holm([found.p for found in comparisons]))
    first, control = comparisons[0], placebo(losses, condition, shuffles, seed)
    fewest = fewest_prompts(len(there))
    gained = adjusted[0] <= ALPHA and first.change < 0
    excluded = first.low is not None and first.low > 1 - WORTH
    verdict = judge(gained, excluded and first.prompts >= fewest, control)
    expected = first.ratio <= 1 - WORTH and first.p < EXPECTED_P
    absent = tuple(name for name in family if name not in there)
    said = [
        headline(first, adjusted[0], verdict, fewest),
        *(
            against(found, p, found.change < 0, figures(found, p))
            for found, p in zip(comparisons[1:], adjusted[1:], strict=True)
        ),
        placebo_words(control, condition, "lose less than") if gained else "",
        *(quality_words(found) for found in quality),
        f"Not measured, so not compared with: {', '.join(absent)}." if absent else "",
        lonely(comparisons),
        expectation(expected) if expects else "",
    ]
    return Proof(
        condition,
        comparisons,
        adjusted,
        control,
        tuple(quality),
        tuple(compare(losses, condition, name, seed) for name in others),
        absent,
        fewest,
        verdict,
        expected,
        tuple(filter(None, said)),
    )


def placebo(
    losses: Mapping[str, Losses], condition: str, shuffles: Sequence[str], seed: int = 0
) -> Placebo | None:
    """Budgets against each of their shuffles, prompts as clusters; None without shuffles.

    The sign test counts, on each prompt, the shuffles that the budgets beat less those that beat
    them, and flips the sign of all of a prompt's pairs at once: five shuffles of one prompt are not
    five prompts.

    Raises:
        ValueError: As in :func:`~lightning_kv.stats.comparison.compare`; or the shuffles are not
            all measured on the same prompts.
    """
    if not shuffles:
        return None
    found = tuple(compare(losses, condition, name, seed) for name in shuffles)
    if len({frozenset(losses[name]) for name in shuffles}) > 1:
        raise ValueError(
            f"The {len(shuffles)} shuffles are not all measured on the same prompts, which are "
            "counted as clusters. Measure each on all of them."
        )
    wins = np.mean([-np.sign(log_ratios(losses, condition, name)[0]) for name in shuffles], axis=0)
    p = sign_flip_p(wins.tolist(), permutations=FLIPS, seed=seed)
    better = sum(comparison.change < 0 for comparison in found)
    return Placebo(
        found, better, float((1 + wins.mean()) / 2), p, better == len(found) and p <= ALPHA
    )


def keeps_quality(
    values: Mapping[str, Losses],
    metric: str,
    condition: str,
    against: str,
    margin: float,
    higher_is_better: bool = True,
) -> Quality:
    """Whether a metric falls by no more than a margin (non-inferiority, one-sided at 95 %).

    Seeds of a prompt are averaged as they are: scores are differences, not ratios. Where several
    metrics must all keep, each is tested at its full level: the chance that all pass by luck is no
    greater than that of one.

    Args:
        values: The metric by condition and prompt, one number or one per seed.
        metric: Its name.
        condition: What is judged.
        against: What it is compared with.
        margin: The most that may be lost on average, in the unit of the metric.
        higher_is_better: Whether more is better.

    Raises:
        ValueError: A condition is missing, the two share no prompt, a prompt has not as many seeds
            under both, or a value or the margin is not finite.

    Example:
        >>> own, other = dict.fromkeys("abcdef", 0.8), dict.fromkeys("abcdef", 0.81)
        >>> values = {"optimal": own, "uniform": other}
        >>> keeps_quality(values, "aesthetic", "optimal", "uniform", 0.02).found.verdict
        'not worse'
    """
    own, other = shared_prompts(values, condition, against)
    both = sorted(own.keys() & other.keys())
    mine, theirs = (prompt_means({p: side[p] for p in both}) for side in (own, other))
    sign = 1 if higher_is_better else -1
    lost = [sign * (theirs[prompt] - mine[prompt]) for prompt in both]
    return Quality(metric, condition, against, non_inferiority(lost, margin))


def fewest_prompts(tests: int) -> int:
    """Prompts below which no effect, however large, passes so many tests after Holm's adjustment.

    The smallest p value of n prompts is ``2 / 2**n``.

    >>> [fewest_prompts(n) for n in (1, 4)]
    [6, 8]
    """
    return math.ceil(math.log2(2 * tests / ALPHA))


def judge(gained: bool, excluded: bool, control: Placebo | None) -> ProofVerdict:
    """The verdict from the comparison with uniform and the placebo.

    Args:
        gained: The budgets are better than uniform ones.
        excluded: It is excluded that they are so much better that it would be worth having.
        control: The placebo, if there is one.
    """
    if gained:
        return "optimal" if control is None or control.holds else "spread"
    return "uniform" if excluded else "unclear"


def figures(found: Comparison, p: float) -> str:
    """Change, interval and p value, with Wilcoxon's word where it differs.

    Args:
        found: The comparison.
        p: Its p value, adjusted.
    """
    ends = (
        "no interval"
        if found.low is None
        else (f"95 % interval {change(found.low)} to {change(found.high)}")
    )
    doubt = ""
    if (found.p <= ALPHA) != (found.wilcoxon <= ALPHA):
        doubt = f"; by signed ranks {number(found.wilcoxon)}: a few prompts decide"
    return f"{change(found.ratio)} ({ends}, p {number(p)}{doubt})"


def change(ratio: float) -> str:
    """A ratio as a change.

    >>> change(0.9), change(1.02)
    ('-10.0 %', '+2.0 %')
    """
    return f"{100 * (ratio - 1):+.1f} %"


def headline(first: Comparison, adjusted: float, verdict: ProofVerdict, fewest: int) -> str:
    """The verdict against uniform budgets."""
    on = f"on {several(first.prompts, 'held-out prompt')}"
    seen = f"{first.condition} budgets change the loss of {first.against} ones by "
    seen += f"{figures(first, adjusted)} {on}"
    worth = f"a loss lower by {percent(WORTH)}"
    if verdict in ("optimal", "spread"):
        small = first.low is not None and first.low > 1 - WORTH
        return f"{upper(first.condition)} is better than {first.against}: {seen}." + (
            f" The gain is surely below {percent(WORTH)}." if small else ""
        )
    if verdict == "uniform":
        return f"{upper(first.against)} is enough here: {seen}, so {worth} is excluded."
    short = f" No effect can be shown on fewer than {fewest} prompts." * (first.prompts < fewest)
    needed = first.needed and max(first.needed, fewest)
    more = f"; about {needed} prompts would show it" if needed and needed > first.prompts else ""
    return f"Undecided: {seen}. {upper(worth)} is neither shown nor excluded{more}.{short}"


def expectation(came: bool) -> str:
    """Whether it came as expected."""
    return (
        f"Expected beforehand was a loss lower by {percent(WORTH)} or more, with p below "
        f"{EXPECTED_P}: that {'came' if came else 'did not come'} true."
    )


def lonely(comparisons: Sequence[Comparison]) -> str:
    """Which prompts do not count everywhere, if any."""
    names = sorted({prompt for found in comparisons for prompt in found.left_out})
    if not names:
        return ""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"Not measured under all conditions, so left out where one is missing: {some}."


def against(found: Any, adjusted: float, better: bool, seen: str) -> str:
    """One more comparison of the family.

    Args:
        found: What is compared with what.
        adjusted: Its p value.
        better: Whether the condition is better on average.
        seen: Its figures.
    """
    said = "cannot be told from"
    if adjusted <= ALPHA:
        said = "is better than" if better else "is worse than"
    return f"{upper(found.condition)} {said} {found.against}: {seen}."


def placebo_words(control: Placebo | None, condition: str, better: str) -> str:
    """What the shuffles say, where there is a gain to explain.

    Args:
        control: The placebo, if there is one.
        condition: The budgets that are judged.
        better: What they do where they are better: "lose less than".
    """
    if control is None:
        return "No shuffled budgets were measured, so it is open whether the assignment matters."
    dealt = several(len(control.shuffles), "shuffle")
    seen = (
        f"{condition} budgets {better} {control.better} of {dealt} and win "
        f"{percent(control.won)} of all pairs (p {number(control.p)})"
    )
    if control.holds:
        return f"Which head gets which budget matters: {seen}."
    return (
        f"It is not shown that it matters which head gets which budget: {seen}. The spread of "
        "budgets may have done the work."
    )


def quality_words(found: Quality) -> str:
    """What the metric says."""
    test = found.found
    said = {
        "not worse": f"is kept within {number(test.margin)} of",
        "worse": f"is worse by more than {number(test.margin)} than",
        "unclear": f"is not shown to keep within {number(test.margin)} of",
    }[test.verdict]
    seen = f"mean loss {number(test.mean)} on {several(test.n, 'prompt')}"
    return f"{upper(found.metric)} {said} that of {found.against} budgets ({seen})."
