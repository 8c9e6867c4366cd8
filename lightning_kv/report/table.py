"""The table at the end of a run: who keeps the quality, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from textwrap import wrap
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_kv.runs.intervals import interval_note
from lightning_kv.runs.summary import hindsight
from lightning_kv.runs.units import counted, sets_words
from lightning_kv.runs.verdict import extent
from lightning_kv.utilities.formatting import format_bytes, percent

NOTHING = "\N{EN DASH}"
SCREEN = 120  # characters of a line
NAME_WIDTH = 20  # characters after which a policy's name goes on in the next line
_share = partial(percent, digits=1)
Cell = tuple["float | None", str]  # value and how it is shown


def render_tables(summary: dict[str, Any]) -> Group:
    """Quality and cost of every policy; every table fits into 120 columns.

    Args:
        summary: Content of ``summary.json``.
    """
    costs = [value for policy in summary["policies"].values() for value in policy["cost"].values()]
    known = any(cost is not None for cost in costs)
    parts: list[RenderableType] = [*quality_tables(summary)]
    if notes := quality_notes(summary):
        parts.append(Text("\n".join(notes) + "\n", "italic"))
    return Group(*parts, *([cost_table(summary)] if known else []))


def shown_frames(run: dict[str, Any]) -> str:
    """Pixel frames in words, where they are not as many as latent ones."""
    shown = run.get("pixel_frames", run["frames"])
    return "" if shown == run["frames"] else f" ({shown} pixel frames)"


def quality_tables(summary: dict[str, Any]) -> list[Table]:
    """Mean and 95 % interval of every metric; an arrow shows which way is better.

    The figure after ± is the longer arm of the interval; in brackets behind a distance between
    sets stands what equal sets would show. The best value of a column, reference and bounds left
    out, is bold; a star marks a significant difference to the reference. Metrics that do not fit
    beside the others go on in further tables.
    """
    run, policies = summary["run"], summary["policies"]
    given = f" ({run['context_frames']} of them given)" if run.get("context_frames") else ""
    names = dict.fromkeys(name for policy in policies.values() for name in policy["metrics"])
    columns = [
        _quality_column(name, summary)
        for name in names
        if any(policy["metrics"][name]["mean"] is not None for policy in policies.values())
    ]
    tables = []
    for group in _groups(columns, _names(summary)) or [[]]:
        table = _table(
            "Quality, continued"
            if tables
            else f"Quality, reference {summary['reference']}: mean ± 95 % interval, "
            f"{extent(summary)}, {run['frames']} frames{given}{shown_frames(run)}"
        )
        table.add_column("policy", no_wrap=True)
        for header, _ in group:
            _column(table, header)
        tables.append(_fill(table, summary, [cells for _, cells in group]))
    return tables


def _quality_column(name: str, summary: dict[str, Any]) -> tuple[str, list[Text]]:
    """Head and cells of a metric."""
    results = [policy["metrics"][name] for policy in summary["policies"].values()]
    better = results[0]["higher_is_better"]
    unit = results[0]["unit"].replace("^2", "\N{SUPERSCRIPT TWO}")
    header = name.replace("/", "/ ").replace("_", " ").replace(" ", "\n")
    header += "" if better is None else " ↑" if better else " ↓"
    cells = [(result["mean"], _estimate(result, summary)) for result in results]
    return f"{header}\n({unit})" if unit else header, _highlight(cells, better, summary)


def _estimate(result: dict[str, Any], summary: dict[str, Any]) -> str:
    """Mean with its interval or its null, and a star where it differs from the reference."""
    text, null = format_estimate(result["mean"], result["ci95"]), result.get("null")
    if None not in (result["mean"], null):
        text += f" ({format_number(null, max(abs(result['mean']), abs(null)))})"
    return text + ("*" if _differs(result, summary) else "")


def _differs(result: dict[str, Any], summary: dict[str, Any]) -> bool:
    p = (result.get("paired") or {}).get("p_holm")
    return p is not None and p <= summary["family"]["level"]


def _groups(
    columns: list[tuple[str, list[Text]]], names: list[str]
) -> list[list[tuple[str, list[Text]]]]:
    """As many columns as fit beside the names, then the next."""
    first = max((len(line) for name in names for line in name.split("\n")), default=0)
    groups: list[list[tuple[str, list[Text]]]] = []
    left = 0
    for header, cells in columns:
        lines = [*header.split("\n"), *(cell.plain for cell in cells)]
        width = max(map(len, lines)) + 2  # with the space around it
        if width > left:
            groups.append([])
            left = SCREEN - first - 3
        groups[-1].append((header, cells))
        left -= width
    return groups


def cost_table(summary: dict[str, Any]) -> Table:
    """Cache bytes, rows read and scored, time per chunk and speed-up of every policy."""
    table = _table(f"Cost; speed-up against {summary['reference']} on the same clips")
    table.add_column("policy", no_wrap=True)
    columns = []
    for header, name, show, better in (
        ("KV peak ↓", "kv_bytes_peak", format_bytes, False),
        ("reads ↓", "kv_read_fraction", _share, False),
        ("scored ↓", "kv_scored_fraction", _share, False),
        ("kept ↓", "kv_kept_fraction", _share, False),
        ("ms/chunk\np50 ↓", "seconds_per_chunk_p50", _milliseconds, False),
        ("ms/chunk\np95 ↓", "seconds_per_chunk_p95", _milliseconds, False),
        ("speed-\nup ↑", "speedup", "{:.2f}x".format, True),
    ):
        values = [policy["cost"].get(name) for policy in summary["policies"].values()]
        if name == "kv_kept_fraction" and set(values) == {None}:
            continue  # records of older runs do not know it
        _column(table, header)
        columns.append(_highlight([_cell(value, show) for value in values], better, summary))
    return _fill(table, summary, columns)


def format_estimate(mean: float | None, interval: list[float] | None) -> str:
    """A mean and the longer arm of its interval, short: 14 characters for values below 1000.

    >>> format_estimate(0.9941, [0.9921, 0.9955])
    '0.994 ±0.002'
    >>> format_estimate(0.0000312, [0.0000300, 0.0000325])
    '3.1e-5 ±1e-6'
    >>> format_estimate(0.0, [0.0, 0.0])
    '0'
    """
    if mean is None:
        return NOTHING
    if not interval:
        return format_number(mean, abs(mean), 1)
    arm = max(mean - interval[0], interval[1] - mean, 0.0)
    scale = max(abs(mean), arm)
    return f"{format_number(mean, scale, 1)} ±{format_number(arm, scale, 0)}" if scale else "0"


def format_number(value: float, scale: float, digits: int = 1) -> str:
    """A number as one of size ``scale`` is shown, so that mean and interval go together.

    Args:
        value: The number.
        scale: Size of the numbers it stands with.
        digits: Those after the point where it is too small or large for plain notation.

    >>> format_number(0.98765, 1.0), format_number(0.0000312, 0.0000312)
    ('0.988', '3.1e-5')
    """
    if value == 0:
        return "0"
    if 1e-3 <= scale < 1e5:
        return f"{value:.{1 if scale >= 10 else 3 if scale >= 0.01 else 4}f}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _cell(value: float | None, show: Callable[[float], str]) -> Cell:
    return value, NOTHING if value is None else show(value)


def _table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        title=Text(title, style="bold"),
        title_justify="left",
        padding=(0, 1, 0, 0),
    )


def _column(table: Table, header: str) -> None:
    # Digits are never cut away: in a narrow window a cell breaks at its space instead.
    table.add_column(Text(header), justify="right", overflow="fold")


def _highlight(
    cells: list[Cell], higher_is_better: bool | None, summary: dict[str, Any]
) -> list[Text]:
    """Texts of one column, the best value bold, reference and bounds left out."""
    if higher_is_better is None:
        return [Text(text) for _, text in cells]
    out = {summary["reference"], *hindsight(summary)}
    rivals = [
        None if name in out else value
        for name, (value, _) in zip(summary["policies"], cells, strict=True)
    ]
    known = [value for value in rivals if value is not None]
    best = (max if higher_is_better else min)(known, default=None)
    bold = [value is not None and value == best for value in rivals]
    return [
        Text(text, "bold" if strong else "") for strong, (_, text) in zip(bold, cells, strict=True)
    ]


def _fill(table: Table, summary: dict[str, Any], columns: list[list[Text]]) -> Table:
    """Add one row per policy; reference and bounds are marked."""
    for name, *cells in zip(_names(summary), *columns, strict=True):
        table.add_row(Text(name), *cells)
    return table


def _names(summary: dict[str, Any]) -> list[str]:
    """Names of the policies, in lines that fit; reference and bounds are marked."""
    marked = {name: f"{name} (bound)" for name in hindsight(summary)}
    marked[summary["reference"]] = f"{summary['reference']} (reference)"
    return ["\n".join(wrap(marked.get(name, name), NAME_WIDTH)) for name in summary["policies"]]


def quality_notes(summary: dict[str, Any]) -> list[str]:
    """What intervals, stars and brackets mean, what sets are made of, why values are missing."""
    policies = summary["policies"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for policy, result in policies.items():
        for metric, value in result["metrics"].items():
            most = max(other["metrics"][metric]["n"] for other in policies.values())
            if value["status"] != "ok":
                reasons.setdefault((metric, value["status"]), []).append(policy)
            elif value["n"] < most and not value.get("sets"):
                over = f"over {counted(value['n'], value.get('clips'))} only"
                reasons.setdefault((metric, over), []).append(policy)
            if value.get("sets") and value["mean"] is not None:
                reasons.setdefault((metric, sets_words(value)), []).append(policy)
    found: dict[str, list[str]] = {}
    for (metric, reason), names in reasons.items():
        whose = "" if len(names) == len(policies) else f" ({', '.join(names)})"
        found.setdefault(reason + whose, []).append(metric)
    values = [value for result in policies.values() for value in result["metrics"].values()]
    notes = [note] if (note := interval_note([summary])) else []
    if any(_differs(value, summary) for value in values):
        family = summary["family"]
        notes.append(
            f"* differs from {summary['reference']}: p at most {family['level']:g} after "
            f"{family['correction']}'s correction over {family['tests']} tests"
        )
    if any(value.get("null") is not None for value in values):
        notes.append("In brackets: the distance that equal sets would show")
    return notes + [f"{', '.join(metrics)}: {reason}" for reason, metrics in found.items()]
