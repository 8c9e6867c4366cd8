"""From records to ``summary.json``: means over prompts with intervals, plain facts for cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from lightning_kv.runs.costs import policy_cost
from lightning_kv.runs.derived import derivable
from lightning_kv.runs.directory import SCHEMA, Record
from lightning_kv.runs.units import (
    clips_with,
    grouped,
    mean_of,
    metric_of,
    unit_curves,
    unit_means,
)

Interval = Callable[[Sequence[float]], "tuple[float, float] | None"]


@dataclass(frozen=True)
class MetricInfo:
    """What a reader must know about a metric.

    Args:
        unit: Unit of the value, such as ``dB``; empty where it has none.
        higher_is_better: Which way is good; None where neither is.
        recipe: How the value is computed, in one line.
        undefined: Why no clip may have a value; becomes the status then.
        against_reference: Whether it compares with the reference, which then has no value.
        identical: Its value for two equal clips, where it compares and that is finite.
        comparable: Whether values may be compared with those of the literature.
        weights: SHA-256 of the network it looks through.
        sets: Whether it compares sets of clips; then no clip has a value.
        encoder: What such a metric looks through.
        frames: Frames of a window that it looks at.
        bounds: Ends of its scale, None where it is open.
    """

    unit: str
    higher_is_better: bool | None
    recipe: str
    undefined: str = "no clip gave one"
    against_reference: bool = False
    identical: float | None = None
    comparable: bool = True
    weights: str | None = None
    sets: bool = False
    encoder: str | None = None
    frames: int | None = None
    bounds: Sequence[float | None] = (None, None)


def summarise(
    records: Iterable[Record],
    *,
    reference: str,
    policies: dict[str, dict[str, Any]],
    metrics: dict[str, MetricInfo],
    run: dict[str, Any],
    model: dict[str, Any],
    fingerprint: str,
    interval: Interval,
) -> dict[str, Any]:
    """Summarise a run, finished or not.

    Clips are taken in the order of their keys, so that the numbers do not depend on how many
    ranks measured them.

    Args:
        records: Records of all policies, each policy and key once.
        reference: Name of the policy that the others are compared with.
        policies: Configuration of every policy, by name, in the order of the table.
        metrics: What is known about every metric, by name, in the order of the table.
        run: Prompts, frames, seeds, device, versions.
        model: Name and configuration of the model.
        fingerprint: Identity of the run.
        interval: Values of the units to a 95 % interval of their mean; None where there are too
            few. A bound that is not finite counts as none.

    Returns:
        The content of ``summary.json``; no NaN, no Infinity. Values are means over units, and so
        is ``n`` their number; ``clips`` counts the clips beneath. ``curves`` holds, per metric, the
        mean over units and its interval for each frame; ``measured``, how many prompts and clips
        there are so far.

    Raises:
        ValueError: A record belongs to a policy that is not in the run.
    """
    clips: dict[str, list[Record]] = {name: [] for name in (*policies, reference)}
    for record in sorted(records, key=lambda record: record["key"]):
        if record["policy"] not in clips:
            raise ValueError(
                f"A record belongs to no policy of this run. It is of {record['policy']!r}. "
                f"The policies are {', '.join(clips)}."
            )
        clips[record["policy"]].append(record)
    every = [record for own in clips.values() for record in own]
    metrics = metrics | {each.name: MetricInfo(**each.facts) for each in derivable(metrics)}
    return {
        "schema": SCHEMA,
        "fingerprint": fingerprint,
        "reference": reference,
        "model": model,
        "run": run,
        "measured": {
            "prompts": len(grouped(every)),
            "clips": len({record["key"] for record in every}),
        },
        "policies": {
            name: {
                "config": config,
                "metrics": {
                    metric: _metric(metric, info, clips[name], interval)
                    for metric, info in metrics.items()
                },
                "cost": policy_cost(clips[name], clips[reference]),
                "curves": _curves(clips[name], interval),
            }
            for name, config in policies.items()
        },
    }


def _metric(name: str, info: MetricInfo, clips: list[Record], interval: Interval) -> dict[str, Any]:
    """One metric of one policy over its units."""
    values = list(unit_means(clips, metric_of(name)).values())
    failed = [clip["failure"] for clip in clips if clip.get("failure")]
    problems = [found[name] for clip in clips if name in (found := clip.get("problems") or {})]
    reason = (problems or [info.undefined])[0] if clips else "no clip is finished"
    status = "ok" if values else f"no value: {reason}"
    if values and problems:
        status = f"{len(problems)} of {len(clips)} clips have no value: {problems[0]}"
    if failed:
        status = f"{len(failed)} of {len(clips)} clips failed: {failed[0]}"
    return {
        "mean": mean_of(values),
        "ci95": _bounds(values, interval),
        "n": len(values),
        "clips": clips_with(clips, metric_of(name)),
        "unit": info.unit,
        "higher_is_better": info.higher_is_better,
        "recipe": info.recipe,
        "against_reference": info.against_reference,
        "identical": info.identical,
        "comparable": info.comparable,
        "weights": info.weights,
        "sets": info.sets,
        "status": status,
    }


def hindsight(summary: dict[str, Any]) -> Sequence[str]:
    """Policies that were told what the reference attended to: bounds, nothing to run."""
    return summary["run"].get("hindsight", ())


def _curves(clips: list[Record], interval: Interval) -> dict[str, dict[str, list[float | None]]]:
    """Mean over units and its interval for each frame of each metric."""
    curves = {}
    for name in dict.fromkeys(name for clip in clips for name in clip["curves"]):
        frames = [
            [value for value in frame if value is not None]
            for frame in zip_longest(*unit_curves(clips, name))
        ]
        bounds = [_bounds(values, interval) or (None, None) for values in frames]
        curves[name] = {
            "mean": [mean_of(values) for values in frames],
            "lo": [lo for lo, _ in bounds],
            "hi": [hi for _, hi in bounds],
        }
    return curves


def _bounds(values: list[float], interval: Interval) -> list[float] | None:
    """The interval as JSON, null where there is none."""
    bounds = interval(values) if values else None
    if bounds is None or not all(map(math.isfinite, bounds)):
        return None
    return [float(bound) for bound in bounds]
