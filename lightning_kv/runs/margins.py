"""How much worse than the reference a policy may be, and how much worse it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_kv.runs.units import Clips, Paired, metric_of, paired_units
from lightning_kv.stats.bootstrap import confidence_below, paired_interval
from lightning_kv.utilities.nearest import hint

MARGINS = {"recall": 0.02, "revisit_error": 0.002, "ssim": 0.02, "psnr": 0.5}
"""The margin where none is given: of the first of these that the run has values for."""

FROM_IDENTICAL = {"psnr": 70.0}
"""The same where the loss is against clips that equal the reference: they have 100 dB, and of two
videos that differ a psnr of 30 dB counts as near."""

Facts = dict[str, dict[str, Any]]
"""What a summary says about each metric: which way is good, whether it needs the reference."""


@dataclass(frozen=True)
class Loss:
    """How much worse than the reference, over the prompts that both have a value for.

    Args:
        metric: Its name.
        margin: The most that is allowed, in the metric's unit.
        value: Mean of the policy.
        reference: Mean of the reference on the same prompts.
        mean: Mean of the paired differences; positive is worse.
        ci95: Its 95 % interval; None for fewer than two prompts.
        confidence: That the mean loss is within the margin.
        n: Number of prompts.
        clips: Number of clips that their values are means of.
        limit: The worst value within the margin, where the reference's is that of two identical
            clips, as the metric compares with the reference.
    """

    metric: str
    margin: float
    value: float
    reference: float
    mean: float
    ci95: tuple[float, float] | None
    confidence: float
    n: int
    clips: int | None = None
    limit: float | None = None

    @property
    def within(self) -> bool:
        """Whether the mean itself keeps the margin."""
        return self.mean <= self.margin

    @property
    def share(self) -> float:
        """The loss ÷ the margin, to compare metrics of different units."""
        return self.mean / self.margin if self.margin else self.mean


def loss_of(own: Clips, base: Clips, metric: str, facts: Facts, margin: float) -> Loss | None:
    """Paired loss of a policy in one metric; None where no prompt has both values.

    Args:
        own: Records of the policy.
        base: Records of the reference.
        metric: Its name.
        facts: About the metrics.
        margin: The most that is allowed.
    """
    pairs = paired_values(own, base, metric, facts)
    values, others = pairs.values, pairs.others
    if not values:
        return None
    fact = facts[metric]
    good, bad = (others, values) if fact["higher_is_better"] else (values, others)
    losses = [a - b for a, b in zip(good, bad, strict=True)]
    return Loss(
        metric=metric,
        margin=margin,
        value=math.fsum(values) / len(values),
        reference=math.fsum(others) / len(others),
        mean=math.fsum(losses) / len(losses),
        ci95=paired_interval(good, bad),
        confidence=confidence_below(losses, margin),
        n=len(values),
        clips=pairs.clips,
        limit=_limit(fact, margin) if fact["against_reference"] else None,
    )


def _limit(fact: dict[str, Any], margin: float) -> float:
    """The worst value that is within a margin of that of two identical clips."""
    return fact["identical"] + (-margin if fact["higher_is_better"] else margin)


def paired_values(own: Clips, base: Clips, metric: str, facts: Facts) -> Paired:
    """A policy's value and the reference's, for each prompt that has both.

    A metric that compares with the reference has the value of two equal clips there.
    """
    fact = facts[metric]
    other = (lambda _: fact["identical"]) if fact["against_reference"] else None
    return paired_units(own, base, metric_of(metric), other)


def usable(clips: dict[str, Clips], reference: str, facts: Facts) -> list[str]:
    """Metrics that some policy and the reference both have a value for."""
    rivals = [own for name, own in clips.items() if name != reference]
    base = clips[reference]
    better = (metric for metric, fact in facts.items() if fact["higher_is_better"] is not None)
    return [m for m in better if any(paired_values(own, base, m, facts).values for own in rivals)]


def unusable(summary: dict[str, Any], clips: dict[str, Clips]) -> dict[str, str]:
    """Metrics that have values and still cannot be judged, and why, in a clause.

    Args:
        summary: Content of ``summary.json``.
        clips: Records by policy and key.
    """
    reference = summary["reference"]
    facts = summary["policies"][reference]["metrics"]
    able, found = usable(clips, reference, facts), {}
    for metric, fact in facts.items():
        means = (policy["metrics"][metric]["mean"] for policy in summary["policies"].values())
        if metric in able or all(mean is None for mean in means):
            continue
        if fact["sets"]:
            found[metric] = "it compares sets, so no prompt has a value"
        elif fact["higher_is_better"] is None:
            found[metric] = "neither more nor less of it is better"
        elif fact["against_reference"] and fact["identical"] is None:
            found[metric] = (
                f"it compares with {reference}, and what two identical clips have, which the loss "
                "would be counted from, is not known"
            )
        else:
            found[metric] = f"no prompt has one under both {reference} and another policy"
    return found


def default_margins(
    able: Sequence[str],
    unable: Mapping[str, str] | None = None,
    defaults: Mapping[str, float] = MARGINS,
) -> dict[str, float]:
    """The margin where none was given.

    Args:
        able: Metrics that can be judged.
        unable: Others that have values, and why they cannot be.
        defaults: Margins by metric; the first that can be judged counts.

    Raises:
        ValueError: There is a default for none of them.
    """
    for metric, margin in defaults.items():
        if metric in able:
            return {metric: margin}
    given = ", ".join(f"{metric} ({why})" for metric, why in (unable or {}).items())
    given = f" It has values that cannot be judged: {given}." if given else ""
    raise ValueError(
        "There is no margin to judge the loss by: defaults are known for "
        f"{', '.join(defaults)}, and the run can be judged by none of these.{given} {works(able)}"
    )


def check_margins(margins: dict[str, float], facts: Facts, able: Sequence[str]) -> None:
    """Refuse margins that cannot be judged.

    Args:
        margins: Largest loss per metric.
        facts: About the metrics of the run.
        able: Those that can be judged.

    Raises:
        ValueError: An unknown metric, a negative margin, or a metric without values.
    """
    for metric, margin in margins.items():
        if metric not in facts:
            raise ValueError(
                f"This run has no metric {metric!r}.{hint(metric, facts)} {works(able)}"
            )
        check_margin(metric, margin, facts[metric])
        if facts[metric]["against_reference"] and facts[metric]["identical"] is None:
            raise ValueError(
                f"The margin {metric}={margin:g} means nothing: {metric} compares with the "
                "reference rollout, and what two identical clips have, which the loss would be "
                f"counted from, is not known. {works(able)}"
            )
        if metric not in able:
            raise ValueError(
                f"The margin {metric}={margin:g} cannot be judged: no prompt has a value of "
                f"{metric} under a policy and the reference. {works(able)}"
            )


def check_margin(metric: str, margin: float, fact: dict[str, Any]) -> None:
    """Refuse a margin that means nothing, whatever the values are.

    Raises:
        ValueError: It is below 0 or not finite, or the metric has no better and worse.
    """
    if not 0 <= margin < math.inf:
        raise ValueError(
            f"The margin {metric}={margin:g} is no loss that could be allowed. It is how much "
            "worse the metric may be. Give 0 or more, such as recall=0.02."
        )
    if fact["higher_is_better"] is None:
        raise ValueError(
            f"The margin {metric}={margin:g} means nothing: neither more nor less of {metric} is "
            "better. Give a margin of another metric, such as recall=0.02."
        )


def works(able: Sequence[str]) -> str:
    """The part of an error that says what would work."""
    if not able:
        return "Evaluate with another metric too, such as --metrics [recall,ssim]."
    known = MARGINS | FROM_IDENTICAL
    usual = next((metric for metric in known if metric in able), None)
    example = f"{usual}={known[usual]:g}" if usual else f"{able[0]}=NUMBER"
    return f"Metrics that work here: {', '.join(able)}. Write --margin {example}."


def read_margins(text: str | None) -> dict[str, float] | None:
    """Margins from ``recall=0.02,ssim=0.05``; None from None.

    Raises:
        ValueError: Not of that form, or one metric twice.
    """
    if text is None:
        return None
    found: dict[str, float] = {}
    for word in text.split(","):
        name, _, number = (part.strip() for part in word.partition("="))
        try:
            margin = float(number)
        except ValueError:
            raise ValueError(
                f"--margin {text!r} cannot be read: {word!r} is not METRIC=NUMBER. "
                "Write --margin recall=0.02 or --margin recall=0.02,ssim=0.05."
            ) from None
        if name in found:
            raise ValueError(
                f"--margin {text!r} names {name!r} twice, with {found[name]:g} and {margin:g}. "
                "Give one number per metric."
            )
        found[name] = margin
    return found
