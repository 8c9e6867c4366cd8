"""Prompts from best to worst, and how far a run has come."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_kv.runs.directory import Record


@dataclass(frozen=True)
class Ranked:
    """One prompt and how the policies did on it.

    Args:
        key: Key of the prompt.
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
    that has values at all has one for it: means over different policies cannot be compared.

    Args:
        records: Records of the run.
        summary: Its summary.
        metric: What to rank by; None keeps the order of the keys.
        keys: Prompts that may be ranked, such as those with a moving picture.
    """
    policies, prompts = list(summary["policies"]), {}
    values: dict[str, dict[str, float | None]] = {}
    for record in records:
        if record["key"] in keys and record["policy"] in policies:
            prompts[record["key"]] = record["prompt"]
            value = record["metrics"].get(metric)
            values.setdefault(record["key"], dict.fromkeys(policies))[record["policy"]] = value
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
    """Number of prompts for which every policy has a record."""
    done: dict[str, set[str]] = {}
    for record in records:
        done.setdefault(record["key"], set()).add(record["policy"])
    wanted = {*summary["policies"], summary["reference"]}
    return sum(wanted <= policies for policies in done.values())
