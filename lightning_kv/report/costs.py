"""Where the time and the bytes of a policy go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_kv.report.entries import Entry
from lightning_kv.report.table import NOTHING
from lightning_kv.runs.costs import chunk_medians
from lightning_kv.runs.directory import Record
from lightning_kv.utilities.formatting import format_bytes, percent

QUARTER = 4  # the first and the last of so many parts of a clip are compared


@dataclass(frozen=True)
class Bar:
    """A bar of two parts.

    Args:
        first: Length of the strong part, percent of the longest bar.
        second: Length of the pale part that follows it.
        text: Its numbers.
    """

    first: float
    second: float
    text: str


@dataclass(frozen=True)
class CostRow:
    """What one policy costs, as bars.

    Args:
        label: Of the policy.
        is_reference: Whether the others are compared with it.
        memory: Mean bytes, and what the peak adds.
        rows: Share of rows read, and of rows scored.
        growth: Time of a chunk at the start and at the end of a clip, in words.
    """

    label: str
    is_reference: bool
    memory: Bar | None
    rows: Bar | None
    growth: str


def cost_rows(entries: Sequence[Entry], times: dict[str, list[float | None]]) -> list[CostRow]:
    """A row for every policy with a known cost.

    Args:
        entries: Policies.
        times: Of their chunks, by label, see :func:`chunk_times`.
    """
    costs = [entry.result["cost"] for entry in entries]
    most = max((cost["kv_bytes_peak"] or 0 for cost in costs), default=0) or 1
    touched = max((sum(_rows(entry)) for entry in entries), default=0.0) or 1.0
    return [
        CostRow(
            entry.label,
            entry.is_reference,
            _memory(entry, most),
            _touched(entry, touched),
            _growth(times.get(entry.label, [])),
        )
        for entry in entries
        if any(cost is not None for cost in entry.result["cost"].values())
    ]


def chunk_times(
    entries: Sequence[Entry], records: dict[str, list[Record]]
) -> dict[str, list[float | None]]:
    """Median over clips of the seconds of every chunk, by label; empty where none are known.

    Args:
        entries: Policies.
        records: By name of the run.
    """
    found = {}
    for entry in entries:
        own = (record for record in records[entry.run] if record["policy"] == entry.policy)
        found[entry.label] = chunk_medians(own)
    return found


def _memory(entry: Entry, most: float) -> Bar | None:
    mean, peak = (entry.result["cost"][name] for name in ("kv_bytes_mean", "kv_bytes_peak"))
    if mean is None or peak is None:
        return None
    text = f"{format_bytes(mean)} mean, {format_bytes(peak)} peak"
    return Bar(100 * mean / most, 100 * (peak - mean) / most, text)


def _touched(entry: Entry, most: float) -> Bar | None:
    read, scored = _rows(entry)
    if entry.result["cost"]["kv_read_fraction"] is None:
        return None
    text = f"{percent(read, 1)} read" + (f" + {percent(scored, 1)} scored" if scored else "")
    return Bar(100 * read / most, 100 * scored / most, text)


def _rows(entry: Entry) -> tuple[float, float]:
    cost = entry.result["cost"]
    return cost["kv_read_fraction"] or 0.0, cost["kv_scored_fraction"] or 0.0


def _growth(times: Sequence[float | None]) -> str:
    """Whether a chunk takes longer as the history grows; the first chunk is left out."""
    there = [seconds for seconds in times[1:] if seconds is not None]
    if len(there) < QUARTER:
        return NOTHING
    part = len(there) // QUARTER
    start, end = 1000 * fmean(there[:part]), 1000 * fmean(there[-part:])
    return f"{start:.1f} → {end:.1f} ms ({end / start:.2f}x)"
