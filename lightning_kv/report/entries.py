"""What a report compares: the policies of one run or several, side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.summary import hindsight

MAIN = ("recall", "revisit_error", "psnr")  # shown first, in this order
NEAR = ("psnr", "ssim", "ms_ssim", "lpips", "latent_mse")  # where nothing but fidelity is known
SHOWN = 4  # main metrics where neither of these is known
_AMOUNT = re.compile(r"[\d.]+")


@dataclass(frozen=True)
class PageRun:
    """One run and its summary.

    Args:
        directory: Where its records, videos and traces are.
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
        rate: Values of its curves per second; None where that is not known.
        level: Of significance, after correction.
        fronts: By metric and cost: whether it is on the front, and with which probability ``p``.
        is_bound: Whether it was told what the reference attended to, so that nobody can run it.
    """

    label: str
    run: str
    policy: str
    is_reference: bool
    result: dict[str, Any]
    rate: float | None = None
    level: float = 0.05
    fronts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    is_bound: bool = False

    @property
    def role(self) -> str:
        """``reference`` or ``bound``: what stands behind its name; empty for a rival."""
        return "reference" if self.is_reference else "bound" if self.is_bound else ""

    @property
    def title(self) -> str:
        """The label, with the role behind it."""
        return f"{self.label} ({self.role})" if self.role else self.label

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

    def paired(self, metric: str) -> dict[str, Any] | None:
        """Its paired difference to the reference, None where nothing is paired."""
        return self.result["metrics"].get(metric, {}).get("paired")

    def differs(self, metric: str) -> bool:
        """Whether that difference is significant after correction."""
        p = (self.paired(metric) or {}).get("p_holm")
        return p is not None and p <= self.level


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
            rate=run.summary["run"].get("rate"),
            level=(run.summary.get("family") or {}).get("level", 0.05),
            fronts=_fronts(run.summary, policy),
            is_bound=policy in hindsight(run.summary),
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
    """Metrics of clips that the charts show: the main ones that have values, or a few others.

    Where nothing but fidelity is known, what compares with the reference.
    """
    valued = [name for name in with_values(entries) if not of_sets(entries, name)]
    main = [name for name in MAIN if name in valued]
    near = [n for n in valued if n.partition("/")[0] in NEAR and against_reference(entries, n)]
    if set(main) <= {"psnr"} and near:
        return near
    directed = [name for name in valued if direction(entries, name) is not None]
    return main or (directed or valued)[:SHOWN]


def headline(entries: Sequence[Entry]) -> list[str]:
    """Metrics that tables show first: the main ones, and distances between sets."""
    sets = [name for name in with_values(entries) if of_sets(entries, name)]
    return [*main_metrics(entries), *sets[:2]]


def with_values(entries: Sequence[Entry]) -> list[str]:
    """Metrics that some policy has a value of, in the order of the table."""
    return [name for name in metric_facts(entries) if _valued(entries, name)]


def without_values(entries: Sequence[Entry]) -> dict[str, str]:
    """Metrics that no policy has a value of, and why."""
    facts, there = metric_facts(entries), with_values(entries)
    return {
        name: fact["status"].removeprefix("no value: ")
        for name, fact in facts.items()
        if name not in there
    }


def main_metric(entries: Sequence[Entry]) -> str | None:
    """The one metric prompts are ranked by: recall, else PSNR, else the first with a value.

    One in which neither way is better, or that no single clip has, ranks nothing.
    """
    able = [
        name
        for name in with_values(entries)
        if direction(entries, name) is not None and not of_sets(entries, name)
    ]
    return next((name for name in ("recall", "psnr", *able) if name in able), None)


def direction(entries: Sequence[Entry], metric: str) -> bool | None:
    """Whether more of a metric is better; None where neither way is."""
    return metric_facts(entries)[metric]["higher_is_better"]


def against_reference(entries: Sequence[Entry], metric: str) -> bool:
    """Whether a metric compares with the reference, so that it says nothing about that itself."""
    return bool(metric_facts(entries)[metric].get("against_reference"))


def of_sets(entries: Sequence[Entry], metric: str) -> bool:
    """Whether a metric compares sets of clips, so that no single clip has a value."""
    return bool(metric_facts(entries)[metric].get("sets"))


def arrow(better: bool | None) -> str:
    """Which way is good, after a name; nothing where neither is.

    >>> arrow(True), arrow(None)
    (' ↑', '')
    """
    return "" if better is None else " ↑" if better else " ↓"


def spoken(metric: str) -> str:
    """A metric's name as a head.

    >>> spoken("latent_mse")
    'latent mse'
    """
    return metric.replace("_", " ")


def unit_text(unit: str) -> str:
    """A unit as it is written.

    >>> unit_text("latent^2")
    'latent²'
    """
    return unit.replace("^2", "\N{SUPERSCRIPT TWO}")


def _fronts(summary: dict[str, Any], policy: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Where a policy stands on the fronts of its run."""
    return {
        metric: {axis: found[policy] for axis, found in axes.items() if policy in found}
        for metric, axes in (summary.get("pareto") or {}).items()
    }


def _valued(entries: Sequence[Entry], metric: str) -> bool:
    rivals = [entry for entry in entries if not entry.is_reference] or entries
    return any(entry.mean(metric) is not None for entry in rivals)


def _size(entry: Entry) -> tuple[float, str]:
    """Budgets in order: by their number, then as text."""
    number = _AMOUNT.match(entry.budget)
    return (float(number[0].rstrip(".")) if number else 0.0, entry.budget)
