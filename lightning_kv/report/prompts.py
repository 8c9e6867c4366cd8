"""Prompts from best to worst, and how far a run has come."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_kv.runs.directory import Record
from lightning_kv.runs.units import finished_units, grouped, metric_of, unit_means


@dataclass(frozen=True)
class Ranked:
    """One prompt and how the policies did on it.

    Args:
        key: Key of the prompt, or of one of its samples: the one that is shown.
        prompt: Its text.
        score: Mean of the metric over the policies; None where it is not ranked by one.
        values: Value of every policy, the reference included; None where it has none.
    """

    key: str
    prompt: str
    score: float | None
    values: dict[str, float | None]


def ranked(
    records: Sequence[Record], summary: dict[str, Any], metric: str | None, keys: Collection[str]
) -> list[Ranked]:
    """Prompts from best to worst by the mean of a metric over the policies.

    The reference does not count (unless it is alone). A prompt is ranked only when every policy
    that has values at all has one for it: means over different policies cannot be compared. Of
    several samples of a prompt, values are the means.

    Args:
        records: Records of the run.
        summary: Its summary.
        metric: What to rank by; None keeps the order of the keys.
        keys: Prompts that may be ranked, such as those with a video.
    """
    policies = list(summary["policies"])
    own = [record for record in records if record["policy"] in policies]
    shown = {  # of several samples the first that may be ranked stands for its prompt
        unit: min(found)
        for unit, clips in grouped(own).items()
        if (found := [record["key"] for record in clips if record["key"] in keys])
    }
    prompts = {record["key"]: record["prompt"] for record in own}
    means = {
        name: unit_means((r for r in own if r["policy"] == name), metric_of(metric))
        for name in policies
    }
    values = {
        key: {name: means[name].get(unit) for name in policies} for unit, key in shown.items()
    }
    if metric is None:
        return [Ranked(key, prompts[key], None, values[key]) for key in sorted(values)]
    rivals = [name for name in policies if name != summary["reference"]] or policies
    rivals = [p for p in rivals if any(own[p] is not None for own in values.values())]
    sign = -1 if summary["policies"][policies[0]]["metrics"][metric]["higher_is_better"] else 1
    found = [
        Ranked(key, prompts[key], fmean(own[name] for name in rivals), own)
        for key, own in values.items()
        if rivals and all(own[name] is not None for name in rivals)
    ]
    return sorted(found, key=lambda prompt: (sign * prompt.score, prompt.key))


def extremes(prompts: Sequence[Ranked]) -> dict[str, Ranked]:
    """The best, the median and the worst of ranked prompts, as many as there are."""
    if len(prompts) < 3:
        return dict(
            zip(("best", "worst") if len(prompts) == 2 else ("only",), prompts, strict=False)
        )
    return {"best": prompts[0], "median": median(prompts), "worst": prompts[-1]}


def median(prompts: Sequence[Ranked]) -> Ranked:
    """The prompt in the middle; of two, the better."""
    return prompts[(len(prompts) - 1) // 2]


def finished(records: Sequence[Record], summary: dict[str, Any]) -> int:
    """Number of prompts of which every policy has a record of every sample."""
    return finished_units(records, {*summary["policies"], summary["reference"]}, summary["run"])
