"""What a report compares: the policies of one run or several, side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_kv.report.records import RunDirectory

MAIN = ("recall", "revisit_error", "psnr")  # shown first, in this order
_AMOUNT = re.compile(r"[\d.]+")


@dataclass(frozen=True)
class PageRun:
    """One run and its summary.

    Args:
        directory: Where its records, moving pictures and traces are.
        summary: Content of ``summary.json``.
    """

    directory: RunDirectory
    summary: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One policy of one run.

    Args:
        label: Its name in tables and charts, different for every entry.
        run: Name of its run.
        policy: Its name in the run.
        is_reference: Whether the others of its run are compared with it.
        result: What the summary holds about it.
    """

    label: str
    run: str
    policy: str
    is_reference: bool
    result: dict[str, Any]

    @property
    def family(self) -> str:
        """The label without its budget: entries of one family share a colour."""
        return self.label.partition("@")[0]

    @property
    def budget(self) -> str:
        """What follows the ``@``; empty where nothing does."""
        return self.label.partition("@")[2]

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over the prompts, None where it has no value."""
        return self.result["metrics"].get(metric, {}).get("mean")

    def interval(self, metric: str) -> list[float] | None:
        """95 % interval of that mean, None where there is none."""
        return self.result["metrics"].get(metric, {}).get("ci95")


def entries_of(runs: Sequence[PageRun]) -> list[Entry]:
    """All policies of all runs, called ``RUN/POLICY`` where several runs have that family."""
    names = run_names([run.directory.path for run in runs])
    count = Counter(
        family
        for run in runs
        for family in {policy.partition("@")[0] for policy in run.summary["policies"]}
    )
    return [
        Entry(
            label=f"{name}/{policy}" if count[policy.partition("@")[0]] > 1 else policy,
            run=name,
            policy=policy,
            is_reference=policy == run.summary["reference"],
            result=result,
        )
        for name, run in zip(names, runs, strict=True)
        for policy, result in run.summary["policies"].items()
    ]


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart, each at least the last part."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = [Path(*part[-length:]).as_posix() for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def families(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries without the references by family, each family from small to large budgets."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if not entry.is_reference:
            found.setdefault(entry.family, []).append(entry)
    return {name: sorted(group, key=_size) for name, group in found.items()}


def metric_facts(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Unit, direction and recipe of every metric, in the order of the table."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        for name, metric in entry.result["metrics"].items():
            found.setdefault(name, metric)
    return found


def main_metrics(entries: Sequence[Entry]) -> list[str]:
    """Metrics that the charts show: the main ones that have values, else the first that has.

    Where nothing but fidelity is known, all that compares with the reference.
    """
    valued = [name for name in metric_facts(entries) if _valued(entries, name)]
    main = [name for name in MAIN if name in valued] or valued[:1]
    against = [name for name in valued if against_reference(entries, name)]
    return against if main == ["psnr"] else main


def main_metric(entries: Sequence[Entry]) -> str | None:
    """The one metric prompts are ranked by: recall, else PSNR, else the first with a value."""
    valued = [name for name in metric_facts(entries) if _valued(entries, name)]
    return next((name for name in ("recall", "psnr", *valued) if name in valued), None)


def against_reference(entries: Sequence[Entry], metric: str) -> bool:
    """Whether a metric compares with the reference, so that it says nothing about that itself."""
    return bool(metric_facts(entries)[metric].get("against_reference"))


def _valued(entries: Sequence[Entry], metric: str) -> bool:
    rivals = [entry for entry in entries if not entry.is_reference] or entries
    return any(entry.mean(metric) is not None for entry in rivals)


def _size(entry: Entry) -> tuple[float, str]:
    """Budgets in order: by their number, then as text."""
    number = _AMOUNT.match(entry.budget)
    return (float(number[0].rstrip(".")) if number else 0.0, entry.budget)
