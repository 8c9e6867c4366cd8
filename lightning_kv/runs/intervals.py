"""What intervals over few prompts are worth: said here once, and shown wherever intervals are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning_kv.stats.bootstrap import coverage_limit

LEVEL = 0.95
"""Of every interval in a summary."""


def too_few(prompts: int) -> bool:
    """Whether the interval of a mean over so many prompts cannot be one of 95 %.

    >>> [n for n in range(9) if too_few(n)]
    [2, 3, 4, 5]
    """
    return prompts > 1 and coverage_limit(prompts) < LEVEL


def limit_words(prompts: int) -> str:
    """The most that such an interval can be.

    >>> limit_words(3), limit_words(4)
    ('at most 75 %', 'at most 88 %')
    """
    return f"at most {100 * coverage_limit(prompts):.0f} %"


def interval_words(low: str, high: str, prompts: int, whose: str = "") -> str:
    """An interval in a sentence, with how sure it is.

    >>> interval_words("1", "2", 8), interval_words("1", "2", 3, " of the loss")
    ('95 % interval 1 to 2', 'interval of the loss 1 to 2, sure to at most 75 %')
    """
    if too_few(prompts):
        return f"interval{whose} {low} to {high}, sure to {limit_words(prompts)}"
    return f"{100 * LEVEL:.0f} % interval{whose} {low} to {high}"


def interval_kind(prompts: int) -> str:
    """What intervals over so many prompts are.

    >>> interval_kind(8), interval_kind(3)
    ('95 % intervals', 'intervals sure to at most 75 %')
    """
    if too_few(prompts):
        return f"intervals sure to {limit_words(prompts)}"
    return f"{100 * LEVEL:.0f} % intervals"


def interval_note(summaries: Iterable[dict[str, Any]]) -> str:
    """A sentence about intervals over too few prompts; empty where there are none.

    Args:
        summaries: Of the runs that are shown together.
    """
    found = (each for summary in summaries for each in _estimates(summary))
    counts = sorted({each["n"] for each in found if _is_short(each)})
    if not counts:
        return ""
    limits = ", ".join(f"{limit_words(n)} with {n}" for n in counts)
    return (
        "Intervals over so few prompts end at the smallest and the largest value or before, and "
        f"hold the true mean less often than in 95 % of all cases: in {limits} prompts."
    )


def _is_short(each: dict[str, Any]) -> bool:
    bounds: Sequence[float] | None = each.get("ci95")
    return bool(bounds) and bounds[0] != bounds[1] and too_few(each.get("n", 0))


def _estimates(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Everything in a summary that has an interval over prompts."""
    for policy in summary["policies"].values():
        for metric in policy["metrics"].values():
            yield from (metric, metric.get("paired") or {})
        for drift in (policy.get("drift") or {}).values():
            yield from (each for each in drift.values() if each)
