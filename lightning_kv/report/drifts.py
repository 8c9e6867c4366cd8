"""Drift in a table: how a metric changes from the start of a clip to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_kv.report.differences import MINUS, p_text, signed, signed_interval
from lightning_kv.report.entries import Entry, main_metrics, metric_facts
from lightning_kv.report.table import NOTHING, format_number

START_END = f"start {MINUS} end"
DEFINITIONS = {
    "start_end_abs": f"|{START_END}|",
    "start_end_corrected": f"|{START_END}|, less what noise alone makes it",
    "quality_drift": f"first 5 s {MINUS} last 5 s",
    "slope_low": "slope per s, lower 95 % bound",
    "slope_high": "slope per s, upper 95 % bound",
    "windowed_minimum": "lowest mean of 1 s",
    "time_to_fraction": "seconds until below 90 % of the start",
    "vde_linear": "VDE, linear weights",
    "vde_log": "VDE, logarithmic weights",
    "vde_late": "VDE, late weights",
    "terminal": "last value of the prefix curve",
}
"""The other definitions of drift, by name, in words."""


@dataclass(frozen=True)
class DriftRow:
    """How a metric drifts under one policy.

    Args:
        label: Of the policy.
        is_reference: Whether the others are compared with it.
        start_end: Mean of the first 15 % of the values minus that of the last, signed, as text.
        interval: Its 95 % interval over prompts.
        against: The same minus that of the reference, prompt by prompt.
        against_interval: Its 95 % interval.
        p: Of that difference, not corrected.
        slope: Per second.
        others: The other definitions, in the order of ``DEFINITIONS``.
    """

    label: str
    is_reference: bool
    start_end: str
    interval: str
    against: str
    against_interval: str
    p: str
    slope: str
    others: tuple[str, ...]


def drift_tables(entries: Sequence[Entry]) -> dict[str, list[DriftRow]]:
    """Rows by metric: the main metrics first, then every other whose drift is known."""
    main = main_metrics(entries)
    names = [*main, *(name for name in metric_facts(entries) if name not in main)]
    tables = {name: drift_rows(entries, name) for name in names}
    return {name: rows for name, rows in tables.items() if rows}


def drift_rows(entries: Sequence[Entry], metric: str) -> list[DriftRow]:
    """A row for each policy whose drift is known, in the order of the table."""
    return [
        _row(entry, found)
        for entry in entries
        if (found := (entry.result.get("drift") or {}).get(metric)) and _mean(found, "start_end")[0]
    ]


def known_definitions(rows: Sequence[DriftRow]) -> list[tuple[str, str]]:
    """Names and words of the other definitions that some policy has a value of."""
    return [
        (name, words)
        for number, (name, words) in enumerate(DEFINITIONS.items())
        if any(row.others[number] != NOTHING for row in rows)
    ]


def other_values(rows: Sequence[DriftRow]) -> list[tuple[DriftRow, list[str]]]:
    """Every row with its values of those definitions."""
    known = {name for name, _ in known_definitions(rows)}
    return [
        (row, [v for n, v in zip(DEFINITIONS, row.others, strict=True) if n in known])
        for row in rows
    ]


def _row(entry: Entry, found: dict[str, Any]) -> DriftRow:
    against = found.get("paired") or {}
    own, bounds = found["start_end"]["mean"], found["start_end"]["ci95"]
    change = against.get("difference")
    scale = max(map(abs, [own, *(bounds or ())]))
    _, slope = _mean(found, "slope")
    return DriftRow(
        label=entry.label,
        is_reference=entry.is_reference,
        start_end=signed(own, scale),
        interval=signed_interval(bounds, scale),
        against=NOTHING if change is None else signed(change),
        against_interval=signed_interval(against.get("ci95")),
        p=p_text(against.get("p_holm") or against.get("p")),
        slope=NOTHING if slope is None else signed(slope),
        others=tuple(_text(_mean(found, name)[1]) for name in DEFINITIONS),
    )


def _mean(found: dict[str, Any], name: str) -> tuple[bool, float | None]:
    """Whether there is a mean of this definition, and the mean."""
    value = (found.get(name) or {}).get("mean")
    return value is not None, value


def _text(value: float | None) -> str:
    return NOTHING if value is None else format_number(value, abs(value))
