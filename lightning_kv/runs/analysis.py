"""What a summary adds to means and intervals: paired differences, drift, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lightning_kv.runs.costs import cost_by_unit
from lightning_kv.runs.directory import Record
from lightning_kv.runs.summary import hindsight
from lightning_kv.runs.units import (
    Clips,
    Paired,
    Value,
    clips_with,
    grouped,
    mean_of,
    metric_of,
    paired_units,
    unit_means,
)
from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.stats.drift import NAMES, Drift, drift
from lightning_kv.stats.inference import effect_size, holm, jackknife, sign_flip_p
from lightning_kv.stats.pareto import front, front_probability

LEVEL = 0.05
AXES = ("kv_bytes_peak", "kv_read_fraction", "seconds_per_chunk_p50")


def analyse(summary: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """The summary of a run with its statistics.

    Adds to every policy ``units`` (values by prompt) and ``drift``, to each of its metrics
    ``paired`` (its difference to the reference, prompt by prompt), and to the summary ``family``
    (what the p values are corrected for) and ``pareto``.

    Args:
        summary: From :func:`lightning_kv.runs.summary.summarise`.
        records: The run's records.
    """
    clips: dict[str, Clips] = {name: {} for name in summary["policies"]}
    for record in sorted(records, key=lambda record: record["key"]):
        clips[record["policy"]][record["key"]] = record
    base = clips[summary["reference"]]
    rate = summary["run"].get("rate")
    for name, policy in summary["policies"].items():
        own = clips[name]
        policy["units"] = unit_values(own)
        rival = name != summary["reference"]
        for metric, value in policy["metrics"].items():
            if value["sets"]:
                value.setdefault("paired", None)
                continue
            compared = rival and not value["against_reference"]
            value["paired"] = paired(own, base, metric) if compared else None
        policy["drift"] = {
            metric: drifts(own, base if rival else {}, metric, rate, rises(policy, metric))
            for metric in policy["curves"]
            if rate
        }
    summary["family"] = corrected(summary)
    summary["pareto"] = pareto(summary, clips)
    return summary


def unit_values(own: Clips) -> dict[str, dict[str, float | None]]:
    """Values of every metric by unit: the mean of its clips, None where none has one."""
    names = dict.fromkeys(name for record in own.values() for name in record["metrics"])
    means = {name: unit_means(own.values(), metric_of(name)) for name in names}
    return {unit: {name: means[name].get(unit) for name in names} for unit in grouped(own.values())}


def paired(own: Clips, base: Clips, metric: str) -> dict[str, Any] | None:
    """Difference to the reference over the prompts that both have a value for.

    Several samples of one prompt are one value, their mean.

    Returns:
        ``difference`` (policy - reference), its 95 % interval ``ci95``, jackknife standard error
        ``se``, two-sided sign-flip ``p``, Cohen's ``d_z``, the number of prompts ``n`` and that of
        the policy's ``clips``; None where nothing is paired.
    """
    return difference(paired_units(own, base, metric_of(metric)))


def difference(found: Paired) -> dict[str, Any] | None:
    """What paired differences say; None where there are none."""
    values = found.differences
    if not values:
        return None
    several = len(values) > 1
    bounds = bca_interval(values, resamples=1000)
    return {
        "difference": math.fsum(values) / len(values),
        "ci95": None if bounds is None else list(bounds),
        "se": jackknife(values)[1] if several else None,
        "p": sign_flip_p(values) if several else None,
        "p_holm": None,
        "d_z": effect_size(values) if several else None,
        "n": len(values),
        "clips": found.clips,
    }


def corrected(summary: dict[str, Any]) -> dict[str, Any]:
    """Fill in ``p_holm`` of every paired difference; says how many tests there were."""
    tests = [
        value["paired"]
        for policy in summary["policies"].values()
        for value in policy["metrics"].values()
        if value["paired"] and value["paired"]["p"] is not None
    ]
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = p
    return {
        "tests": len(tests),
        "correction": "Holm",
        "level": LEVEL,
        "prompts": max((test["n"] for test in tests), default=0),
        # the smallest p of n prompts is 2**(1 - n), and the first of Holm's is multiplied by all
        "prompts_needed": math.ceil(1 + math.log2(max(1, len(tests)) / LEVEL)),
    }


def rises(policy: dict[str, Any], metric: str) -> bool:
    """Whether more of a metric is better."""
    return policy["metrics"][metric]["higher_is_better"] is True


def drifts(own: Clips, base: Clips, metric: str, rate: float, score: bool) -> dict[str, Any]:
    """Drift of a metric's curve: every definition, mean over prompts, and against the reference.

    The drift of a prompt is the mean of that of its clips, each by itself: noise makes a mean of
    curves smoother than any of them.

    Args:
        own: Records of the policy.
        base: Records of the reference; empty for the reference itself.
        metric: Its name.
        rate: Values of a curve per second.
        score: Whether more is better; else definitions that look for the least are left out.
    """
    if not any(record["curves"].get(metric) for record in own.values()):
        return {"paired": None}

    def by(name: str) -> Value:
        def value(record: Record) -> float | None:
            curve = record["curves"].get(metric)
            return getattr(drift_of(tuple(curve), rate), name) if curve else None

        return value

    # the least and the time of a fall say something about a score alone
    alone = () if score else ("windowed_minimum", "time_to_fraction")
    means = {}
    for name in (name for name in NAMES if name not in alone):
        values = list(unit_means(own.values(), by(name)).values())
        means[name] = {
            "mean": mean_of(values),
            "ci95": _bounds(values),
            "n": len(values),
            "clips": clips_with(own.values(), by(name)),
        }
    return {**means, "paired": difference(paired_units(own, base, by("start_end")))}


@lru_cache(maxsize=4096)
def drift_of(curve: tuple[float | None, ...], rate: float) -> Drift:
    """Drift of one curve; those of the reference are asked for once per policy."""
    return drift(curve, rate)


def pareto(summary: dict[str, Any], clips: dict[str, Clips]) -> dict[str, Any]:
    """Who stands on the front of quality and cost, and how probably, per metric and cost.

    Over the prompts that all policies with values share; without such there is no front. Policies
    that know what is to come are no choice, and stand on none.
    """
    clips = {name: own for name, own in clips.items() if name not in hindsight(summary)}
    found: dict[str, Any] = {}
    for metric, better in _directions(summary).items():
        quality = {name: unit_means(own.values(), metric_of(metric)) for name, own in clips.items()}
        for axis in AXES:
            costs = {name: summary["policies"][name]["cost"].get(axis) for name in clips}
            shown = [name for name in clips if quality[name] and costs[name] is not None]
            shared = set.intersection(*(set(quality[name]) for name in shown)) if shown else set()
            if len(shown) < 2 or not shared:
                continue
            means = {n: math.fsum(quality[n][unit] for unit in shared) / len(shared) for n in shown}
            on = front({name: (means[name], costs[name]) for name in shown}, better)
            sure = front_probability(
                {name: quality[name] for name in shown},
                {name: cost_by_unit(clips[name], axis) or costs[name] for name in shown},
                better,
            )
            found.setdefault(metric, {})[axis] = {
                name: {"front": name in on, "p": sure[name]} for name in shown
            }
    return found


def _directions(summary: dict[str, Any]) -> dict[str, bool]:
    """Whether more is better, of the metrics of clips that have a better."""
    metrics = next(iter(summary["policies"].values()))["metrics"]
    better = {name: each["higher_is_better"] for name, each in metrics.items() if not each["sets"]}
    return {name: way for name, way in better.items() if way is not None}


def _bounds(values: Sequence[float]) -> list[float] | None:
    bounds = bca_interval(values, resamples=500) if values else None
    return None if bounds is None else list(bounds)
