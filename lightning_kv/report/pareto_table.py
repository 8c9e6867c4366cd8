"""Who stands on the front of quality and cost, and how probably."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_kv.report.entries import Entry, direction
from lightning_kv.report.table import NOTHING

AXES = {
    "kv_bytes_peak": "bytes",
    "kv_read_fraction": "reads",
    "seconds_per_chunk_p50": "time",
}
"""Kinds of cost that a front may be against, in a word."""

LEAST = 0.05  # probability below which a policy off the fronts is not listed


@dataclass(frozen=True)
class FrontRow:
    """One policy that stands on a front, or may.

    Args:
        label: Of the policy.
        is_reference: Whether the others are compared with it.
        shares: Per kind of cost, the probability of being on that front as text, and whether the
            point itself is on it.
    """

    label: str
    is_reference: bool
    shares: tuple[tuple[str, bool], ...]


def front_axes(entries: Sequence[Entry], metric: str) -> dict[str, str]:
    """Kinds of cost that fronts of a metric are known against; none where neither way is better."""
    if direction(entries, metric) is None:
        return {}
    known = {axis for entry in entries for axis in entry.fronts.get(metric, {})}
    return {axis: word for axis, word in AXES.items() if axis in known}


def front_rows(entries: Sequence[Entry], metric: str) -> list[FrontRow]:
    """Policies that are on a front, or with a probability worth naming; the surest first."""
    axes, found = front_axes(entries, metric), []
    for entry in entries:
        own = [entry.fronts.get(metric, {}).get(axis) for axis in axes]
        if any(each and (each["front"] or each["p"] >= LEAST) for each in own):
            shares = tuple(
                (f"{each['p']:.2f}", each["front"]) if each else (NOTHING, False) for each in own
            )
            most = max(each["p"] for each in own if each)
            found.append((most, FrontRow(entry.label, entry.is_reference, shares)))
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])]


def front_note(entry: Entry, metric: str, axis: str) -> str:
    """What a point says about the front; empty where none is known."""
    found = entry.fronts.get(metric, {}).get(axis)
    if not found:
        return ""
    return f", {'on' if found['front'] else 'off'} the front, P(on it) = {found['p']:.2f}"


def front_runs(entries: Sequence[Entry], metric: str, axis: str) -> list[list[Entry]]:
    """Policies on the front, from the cheapest to the dearest; a list for every run."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.fronts.get(metric, {}).get(axis, {}).get("front"):
            found.setdefault(entry.run, []).append(entry)
    return [sorted(own, key=lambda e: e.result["cost"][axis]) for own in found.values()]
