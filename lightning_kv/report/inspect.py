"""A run in the terminal: tables, sparklines, and in block characters what is kept and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_kv.report import pictures
from lightning_kv.report.entries import Entry, PageRun, entries_of, main_metric
from lightning_kv.report.prompts import finished, median, ranked
from lightning_kv.report.table import NAME_WIDTH, NOTHING, format_number, render_tables
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.traces import read_traces

BARS = " ▁▂▃▄▅▆▇█"  # nothing, then from low to high
GONE, HELD, SOME, READ = " ░▒█"
MERGED_HELD, MERGED_READ = "◌●"
OWN = "\\"
LINE, ROWS, ACROSS = 72, 24, 3  # characters of a sparkline; lines of a picture; pictures in a line
WIDTH = 36  # characters of a picture


def render_inspection(run: RunDirectory, summary: dict[str, Any]) -> RenderableType:
    """Everything about a run that a terminal can show, in 120 columns, with or without colours.

    Args:
        run: Its directory.
        summary: Content of its ``summary.json``.

    Raises:
        ValueError: A record or the trace cannot be read.
    """
    entries, records = entries_of([PageRun(run, summary)]), run.records()
    metric = main_metric(entries)
    done, total = finished(records, summary), summary["run"]["prompts"]
    parts: list[RenderableType] = []
    if done < total:
        parts.append(Text(f"Half-finished: {done} of {total} prompts finished.\n", "bold"))
    parts.append(render_tables(summary))
    if metric is not None and (lines := _sparklines(entries, metric)) is not None:
        parts.append(lines)
    traced = {path.stem for path in run.traces.glob("*.npz")}
    if prompts := ranked(records, summary, metric, traced):
        prompt = median(prompts)
        traces = read_traces(run.traces / f"{prompt.key}.npz")
        shown = {name: traces[name] for name in summary["policies"] if name in traces}
        parts += [_how_to_read(f"{prompt.prompt} ({prompt.key})"), _grid(shown)]
    else:
        parts.append(Text("No traces: none of the finished prompts has one."))
    return Group(*parts, _files(run))


def sparkline(values: Sequence[float | None], low: float, high: float, width: int = LINE) -> str:
    """One character per value, from low to high; a blank where there is none.

    More values than ``width`` are taken together, as the mean of neighbours.

    >>> sparkline([None, 0.0, 0.5, 1.0], 0.0, 1.0)
    ' ▁▅█'
    """
    step = -(-len(values) // width) or 1
    groups = [values[start : start + step] for start in range(0, len(values), step)]
    means = [[value for value in group if value is not None] for group in groups]
    span = (high - low) or 1.0
    return "".join(
        BARS[1 + round(7 * min(max((sum(m) / len(m) - low) / span, 0), 1))] if m else BARS[0]
        for m in means
    )


def picture(trace: pictures.Trace) -> list[str]:
    """Lines of characters: chunks from top to bottom, frames from left to right, mean over heads.

    Long clips are shown coarser: neighbouring chunks or frames share a character.
    """
    held, read, weight = (_mean_over_heads(trace[name]) for name in ("held", "read", "weight"))
    chunks, frames = held.shape
    size = pictures.chunk_frames(trace)
    down, along = -(-chunks // ROWS), -(-frames // WIDTH)
    lines = []
    for top in range(0, chunks, down):
        own = range(top * size, min(top + down, chunks) * size)
        line = ""
        for left in range(0, own.stop, along):
            cell = np.s_[top : top + down, left : left + along]
            is_own = left + along > own.start
            line += OWN if is_own else _character(*(x[cell].mean() for x in (held, read, weight)))
        lines.append(line[:WIDTH])
    return lines


def _mean_over_heads(array: NDArray) -> NDArray[np.float64]:
    """Chunks by frames; the mean over layers and heads, and over query frames."""
    array = array.astype(np.float64) / (255 if array.dtype == np.uint8 else 1)
    return array.mean(axis=tuple(range(1, array.ndim - 1)))


def _character(held: float, read: float, weight: float) -> str:
    """One cell."""
    if held < 1 / 16:
        return GONE
    if weight > held + pictures.ROUNDING:
        return MERGED_READ if read > held / 2 else MERGED_HELD
    return READ if read > held * 3 / 4 else SOME if read > held / 8 else HELD


def _sparklines(entries: Sequence[Entry], metric: str) -> Group | None:
    """The curve of every policy, on one scale; None where there is no curve."""
    curves = {e.label: e.result["curves"].get(metric, {}).get("mean", []) for e in entries}
    rivals = [curves[e.label] for e in entries if not e.is_reference] or list(curves.values())
    there = [value for curve in rivals for value in curve if value is not None]
    if not there:
        return None
    low, high = min(there), max(there)
    title = Text(f"{metric} over the frames of a clip", "bold")
    title.append(f", from {format_number(low, high)} to {format_number(high, high)}", "not bold")
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(max_width=NAME_WIDTH + 8, overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for entry in entries:
        mean = entry.mean(metric)
        text = NOTHING if mean is None else format_number(mean, abs(mean))
        table.add_row(entry.label, sparkline(curves[entry.label], low, high), text)
    return Group(title, table)


def _how_to_read(prompt: str) -> Text:
    text = Text("\nWhat is kept and read", "bold")
    return text.append(
        f", mean over layers and heads; prompt {prompt}\n"
        "A line is a chunk, time runs down; from left to right the frames of the clip.\n"
        f"{READ} read   {SOME} read in part   {HELD} held, hardly read   blank: gone   "
        f"{MERGED_READ} {MERGED_HELD} the same, stands for merged frames too   "
        f"{OWN} the chunk itself\n",
        "not bold",
    )


def _grid(traces: dict[str, pictures.Trace]) -> Table:
    """Pictures side by side, as many as fit."""
    table = Table.grid(padding=(0, 2, 1, 0))
    cells = []
    for name, trace in traces.items():
        cell = Text(name + "\n", "bold", overflow="fold")
        cell.append("\n".join(picture(trace)), "not bold")
        cells.append(cell.append(f"\n{pictures.describe(trace)}", "not bold"))
    for _ in range(ACROSS):
        table.add_column(width=WIDTH + 1)
    for start in range(0, len(cells), ACROSS):
        row = cells[start : start + ACROSS]
        table.add_row(*row, *[Text()] * (ACROSS - len(row)))
    return table


def _files(run: RunDirectory) -> Text:
    """Where to look further."""
    text = Text("Files\n", "bold")
    for path, what in (
        (run.report, "all of this as a page"),
        (run.summary, "every number"),
        (run.videos, "comparison videos"),
        (run.traces, "which frames were kept and read"),
    ):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            text.append(f"{path}  ({what})\n", "not bold")
    return text
