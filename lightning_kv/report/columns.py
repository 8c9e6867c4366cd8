"""Columns of the comparison: what the page, the markdown and the LaTeX table all show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_kv.report.differences import difference_words
from lightning_kv.report.entries import (
    Entry,
    headline,
    metric_facts,
    spoken,
    unit_text,
    with_values,
)
from lightning_kv.report.table import NOTHING, format_estimate, format_number
from lightning_kv.runs.units import counted, sets_words
from lightning_kv.utilities.formatting import format_bytes, percent

COSTS: tuple[tuple[str, str, bool, Callable[[float], str]], ...] = (
    # field, head, whether more is better, how it is shown
    ("kv_bytes_peak", "KV peak", False, format_bytes),
    ("kv_bytes_mean", "KV mean", False, format_bytes),
    ("kv_read_fraction", "reads", False, partial(percent, digits=1)),
    ("kv_scored_fraction", "scored", False, partial(percent, digits=1)),
    ("kv_kept_fraction", "kept", False, partial(percent, digits=1)),
    ("seconds_per_chunk_p50", "ms/chunk", False, lambda seconds: f"{1000 * seconds:.1f}"),
    ("speedup", "speed-up", True, "{:.2f}x".format),
)
WIDE = 11  # columns that one table can hold


@dataclass(frozen=True)
class Cell:
    """One value of one policy.

    Args:
        value: The number; None where there is none.
        text: How it is shown.
        small: What stands below it: its interval, or what equal sets would show.
        estimate: It and its interval in one line.
        note: What else is known about it, in words.
        best: Whether it is the best of its column.
        differs: Whether it differs from the reference significantly.
    """

    value: float | None
    text: str
    small: str = ""
    estimate: str = ""
    note: str = ""
    best: bool = False
    differs: bool = False


@dataclass(frozen=True)
class Column:
    """One column of the comparison.

    Args:
        name: Of the metric or the cost.
        head: What it is called.
        unit: Of its values; empty where they have none.
        better: Whether more is better; None where neither way is.
        cells: One per policy.
        comparable: Whether values may be compared with those of the literature.
        starts: Whether another kind of column starts here.
    """

    name: str
    head: str
    unit: str
    better: bool | None
    cells: tuple[Cell, ...]
    comparable: bool = True
    starts: bool = False


def comparison(entries: Sequence[Entry]) -> tuple[list[Column], list[Column]]:
    """The columns to see first, and the others; where few are known, all of them are first."""
    first, costs = headline(entries), cost_columns(entries)
    rest = [name for name in with_values(entries) if name not in first]
    groups = [
        metric_columns(entries, first),
        costs,
        metric_columns(entries, rest),
    ]
    for group in groups[1:]:
        group[:1] = [replace(column, starts=True) for column in group[:1]]
    columns = [column for group in groups for column in group]
    cut = len(columns) if len(columns) <= WIDE else len(first) + len(costs)
    return columns[:cut], columns[cut:]


def metric_columns(entries: Sequence[Entry], names: Sequence[str]) -> list[Column]:
    """A column for each of these metrics."""
    facts = metric_facts(entries)
    return [
        Column(
            name=name,
            head=spoken(name),
            unit=unit_text(facts[name]["unit"]),
            better=facts[name]["higher_is_better"],
            cells=_marked(entries, [_quality(entry, name) for entry in entries], facts[name]),
            comparable=facts[name].get("comparable", True),
        )
        for name in names
    ]


def cost_columns(entries: Sequence[Entry]) -> list[Column]:
    """A column for each kind of cost that is known of some policy."""
    found = []
    for field, head, more, show in COSTS:
        cells = [_cost(entry.result["cost"].get(field), show) for entry in entries]
        if any(cell.value is not None for cell in cells):
            cells = _marked(entries, cells, {"higher_is_better": more})
            found.append(Column(field, head, "", more, cells))
    return found


def _cost(value: float | None, show: Callable[[float], str]) -> Cell:
    if value is None:
        return Cell(None, NOTHING, estimate=NOTHING, note="no value")
    return Cell(value, show(value), estimate=show(value), note=f"{value:.8g}")


def _quality(entry: Entry, metric: str) -> Cell:
    """Mean and interval, or why there is none."""
    found, value = entry.result["metrics"].get(metric, {}), entry.mean(metric)
    if value is None:
        note = found.get("status", "not measured in this run")
        return Cell(None, NOTHING, estimate=NOTHING, note=note)
    bounds, estimate = entry.interval(metric), format_estimate(value, entry.interval(metric))
    scale = max(abs(value), *map(abs, bounds)) if bounds else abs(value)
    small = " … ".join(format_number(bound, scale) for bound in bounds) if bounds else ""
    note = f"{value:.6g} over {counted(found['n'], found.get('clips'))}"
    if found.get("sets"):
        note = _set_words(found)
        null = found.get("null")
        small = "" if null is None else f"null {format_number(null, scale)}"
        estimate += f" ({small})" if small else ""
    if test := entry.paired(metric):
        note += f"\n{difference_words(test)}"
    return Cell(
        value, format_number(value, scale), small, estimate, note, False, entry.differs(metric)
    )


def _set_words(found: dict[str, Any]) -> str:
    """What a distance between sets is made of."""
    spread = "" if found.get("se") is None else f", standard error {found['se']:.3g}"
    null = "" if found.get("null") is None else f"; equal sets would show {found['null']:.4g}"
    status = "" if found["status"] == "ok" else f"; {found['status']}"
    return f"{found['mean']:.6g} from {sets_words(found)}{spread}{null}{status}"


def _marked(
    entries: Sequence[Entry], cells: Sequence[Cell], facts: dict[str, Any]
) -> tuple[Cell, ...]:
    """Cells with the best one marked: only rivals count, and only where it says something."""
    rivals = [
        cell.value
        for entry, cell in zip(entries, cells, strict=True)
        if not entry.role and cell.value is not None
    ]
    better = facts["higher_is_better"]
    if better is None or not rivals:
        return tuple(cells)
    best = max(rivals) if better else min(rivals)
    alone = 2 * rivals.count(best) <= len(rivals)
    return tuple(
        replace(cell, best=alone and not entry.role and cell.value == best)
        for entry, cell in zip(entries, cells, strict=True)
    )
