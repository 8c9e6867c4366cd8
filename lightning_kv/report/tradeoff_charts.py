"""Charts as inline SVG: quality against cost, with the front that no policy beats.

Text, ink and grid take the page's colours, so the charts follow its light and dark looks. Every
mark of a policy has an id that starts with its family (``policy-3-``), by which a page can fade the
others, and says its numbers when a pointer rests on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_kv.report.entries import (
    Entry,
    against_reference,
    arrow,
    direction,
    families,
    metric_facts,
    spoken,
    unit_text,
)
from lightning_kv.report.pareto_table import front_note, front_runs
from lightning_kv.report.styles import Style, styles
from lightning_kv.report.svg import INK, PAPER, figure, to_svg
from lightning_kv.utilities.formatting import format_bytes, percent


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        title: What it shows.
        svg: An ``<svg>`` element.
        lines: Labels and looks of its lines, where the chart needs its own legend.
    """

    title: str
    svg: str
    lines: tuple[tuple[str, Style], ...] = ()


@dataclass(frozen=True)
class Axis:
    """What a policy costs, as an axis.

    Args:
        name: Field of the summary's ``cost``.
        title: What the axis says.
        show: How a value is written.
    """

    name: str
    title: str
    show: Callable[[float], str]


BYTES = Axis("kv_bytes_peak", "cache at its peak, bytes of one clip", format_bytes)
READS = Axis(
    "kv_read_fraction", "history rows read, share of the reference", partial(percent, digits=0)
)
TIME = Axis("seconds_per_chunk_p50", "time per chunk", lambda seconds: f"{1000 * seconds:.3g} ms")
AXES = (BYTES, READS, TIME)


def tradeoffs(entries: Sequence[Entry], metric: str) -> list[Chart]:
    """Quality against every kind of cost that has values."""
    found = (tradeoff(entries, metric, axis) for axis in AXES)
    return [chart for chart in found if chart is not None]


def tradeoff(entries: Sequence[Entry], metric: str, axis: Axis) -> Chart | None:
    """Quality against cost: a point with its interval per policy, a line per family.

    Returns:
        None where no policy has both values.
    """
    plane = _Plane(metric, axis, styles(entries))
    groups = [[e for e in group if plane.place(e)] for group in families(entries).values()]
    points = [entry for group in groups for entry in group]
    references = [
        e
        for e in entries
        if e.is_reference and plane.place(e) and not against_reference(entries, metric)
    ]
    if not points and not references:
        return None
    with figure(2.9) as (drawn, axes):
        plane.scale(axes, [*points, *references])
        for group in groups:
            plane.draw_family(axes, group)
        for number, entry in enumerate(references):
            plane.draw_reference(axes, entry, number)
        if direction(entries, metric) is not None:
            plane.draw_fronts(axes, front_runs([*points, *references], metric, axis.name))
        plane.write_budgets(drawn, axes, points)
        axes.set_xlabel(axis.title)
        axes.set_ylabel(axis_label(entries, metric))
        notes = {plane.looks[entry.label].mark: plane.note(entry) for entry in points}
        notes |= {f"reference-{i}": plane.note(entry) for i, entry in enumerate(references)}
        svg = to_svg(drawn, f"{metric}-{axis.name}", notes)
    return Chart(f"{metric} against {axis.title}", svg)


@dataclass(frozen=True)
class _Plane:
    """A plane of one metric over one kind of cost, and how policies look on it."""

    metric: str
    axis: Axis
    looks: dict[str, Style]

    def place(self, entry: Entry) -> tuple[float, float] | None:
        """Where a policy stands, None where it lacks a value."""
        cost, quality = entry.result["cost"].get(self.axis.name), entry.mean(self.metric)
        return None if cost is None or quality is None else (cost, quality)

    def note(self, entry: Entry) -> str:
        """What a point says in words."""
        cost, quality = self.place(entry)
        bounds = entry.interval(self.metric)
        spread = f" [{bounds[0]:.4g}, {bounds[1]:.4g}]" if bounds else ""
        place = f"{entry.label}: {self.metric} {quality:.4g}{spread}, {self.axis.show(cost)}"
        return place + front_note(entry, self.metric, self.axis.name)

    def scale(self, axes: Any, shown: list[Entry]) -> None:
        """Logarithmic where values spread far, with plain tick labels."""
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        xs, ys = zip(*map(self.place, shown), strict=True)
        if min(xs) > 0 and max(xs) > 4 * min(xs):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(LogLocator(2, numticks=8))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: self.axis.show(value)))
        if min(ys) > 0 and max(ys) > 30 * min(ys):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())

    def draw_family(self, axes: Any, group: list[Entry]) -> None:
        """Points with bars, joined in the order of their budgets."""
        for entry in group:
            (x, y), look = self.place(entry), self.looks[entry.label]
            if bounds := entry.interval(self.metric):
                bar = axes.plot([x, x], bounds, color=look.colour, lw=1.4, alpha=0.75, zorder=2)
                bar[0].set_gid(f"{look.mark}-bar")
            rim = {"ms": 5.5, "mec": PAPER, "mew": 0.6}
            mark = axes.plot(x, y, look.marker, color=look.colour, zorder=3, **rim)
            mark[0].set_gid(look.mark)
        if len(group) > 1:
            places = zip(*map(self.place, group), strict=True)
            line = axes.plot(*places, color=look.colour, lw=1, alpha=0.5, zorder=2)
            line[0].set_gid(f"policy-{look.number}-line")

    def draw_reference(self, axes: Any, entry: Entry, number: int) -> None:
        """A ring, and a dashed line to compare with."""
        x, y = self.place(entry)
        axes.axhline(y, color=INK, lw=0.7, alpha=0.6, dashes=(3, 2), zorder=1)
        ring = axes.plot(x, y, "o", mfc=PAPER, mec=INK, ms=6, mew=1.2, zorder=2)
        ring[0].set_gid(f"reference-{number}")

    def draw_fronts(self, axes: Any, runs: list[list[Entry]]) -> None:
        """Steps through the points that no other beats: the best that each cost can buy."""
        edges = axes.get_xlim()
        for number, group in enumerate(runs):
            xs, ys = zip(*map(self.place, group), strict=True)
            look = {"color": INK, "lw": 1.1, "alpha": 0.55, "zorder": 1.5}
            line = axes.plot([*xs, edges[1]], [*ys, ys[-1]], drawstyle="steps-post", **look)
            line[0].set_gid(f"front-{number}")
        axes.set_xlim(edges)

    def write_budgets(self, drawn: Any, axes: Any, points: list[Entry]) -> None:
        """Write budgets beside their points; one that finds no free place is left out."""
        drawn.draw_without_rendering()
        scale = 72 / drawn.dpi  # from pixels to points
        spots = [axes.transData.transform(self.place(entry)) * scale for entry in points]
        left, low, right, top = (v * scale for v in axes.get_window_extent().extents)
        taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots]
        for entry, (x, y) in zip(points, spots, strict=True):
            width, height = 4.6 * len(entry.budget), 7.5
            for dx, dy in ((5, 2), (5, -9), (-5 - width, 2), (-5 - width, -9), (-width / 2, 6)):
                box = (x + dx, y + dy, x + dx + width, y + dy + height)
                inside = box[0] > left and box[1] > low and box[2] < right + 8 and box[3] < top + 8
                if inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    look, place = self.looks[entry.label], (dx, dy + 1)
                    text = {"textcoords": "offset points", "fontsize": 7.5, "color": look.colour}
                    note = axes.annotate(entry.budget, self.place(entry), place, **text)
                    note.set_gid(f"{look.mark}-text")
                    break


def _overlap(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    """Whether two boxes, left low right top, overlap."""
    (a, b, c, d), (e, f, g, h) = first, second
    return a < g and e < c and b < h and f < d


def axis_label(entries: Sequence[Entry], metric: str) -> str:
    """Name, unit and direction of a metric."""
    unit = unit_text(metric_facts(entries)[metric]["unit"])
    name = spoken(metric) + (f", {unit}" if unit else "")
    return name + arrow(direction(entries, metric))
