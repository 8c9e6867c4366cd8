"""Charts as inline SVG: quality against cost, and quality over time.

Text, ink and grid take the page's colours, so the charts follow its light and dark looks. Every
mark of a policy has an id that starts with its family (``policy-3-``), by which a page can fade the
others, and says its numbers when a pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_kv.report.entries import Entry, against_reference, families, metric_facts
from lightning_kv.report.styles import Style, styles
from lightning_kv.report.svg import INK, PAPER, figure, to_svg
from lightning_kv.report.table import format_bytes


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
READS = Axis("kv_read_fraction", "history rows read, share of the reference", "{:.0%}".format)
TIME = Axis("seconds_per_chunk_p50", "time per chunk", lambda seconds: f"{1000 * seconds:.3g} ms")
AXES = (BYTES, READS, TIME)
TOGETHER = 4  # curves that one chart can hold


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
        for entry in references:
            plane.draw_reference(axes, entry)
        plane.write_budgets(drawn, axes, points)
        axes.set_xlabel(axis.title)
        axes.set_ylabel(_axis_label(entries, metric))
        notes = {plane.looks[entry.label].mark: plane.note(entry) for entry in points}
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
        return f"{entry.label}: {self.metric} {quality:.4g}{spread}, {self.axis.show(cost)}"

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

    def draw_reference(self, axes: Any, entry: Entry) -> None:
        """A ring, and a dashed line to compare with."""
        x, y = self.place(entry)
        axes.axhline(y, color=INK, lw=0.7, alpha=0.6, dashes=(3, 2), zorder=1)
        axes.plot(x, y, "o", mfc=PAPER, mec=INK, ms=6, mew=1.2, zorder=2)

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


def curves(entries: Sequence[Entry], metric: str) -> list[Chart]:
    """A metric over the frames of a clip, with bands; the reference is dashed.

    A few policies share one chart; more get a chart per family, with equal axes.
    """
    groups = {
        name: own
        for name, group in families(entries).items()
        if (own := [entry for entry in group if _has_curve(entry, metric)])
    }
    shown = [entry for group in groups.values() for entry in group]
    references = [
        e
        for e in entries
        if e.is_reference and _has_curve(e, metric) and not against_reference(entries, metric)
    ]
    if len(shown) <= TOGETHER:
        groups = {"": shown} if shown or references else {}
    limits = _limits([*shown, *references], metric)
    charts = []
    for title, group in groups.items():
        with figure(2.1 if title else 2.9) as (drawn, axes):
            axes.set_ylim(limits)
            axes.set_xlabel("latent frame")
            axes.set_ylabel(_axis_label(entries, metric))
            lines = _draw_curves(axes, group, references, metric, styles(entries))
            notes = {look.mark: label for label, look in lines}
            svg = to_svg(drawn, f"{metric}-curves-{len(charts)}", notes)
        charts.append(Chart(title, svg, lines))
    return charts


def _draw_curves(
    axes: Any,
    group: list[Entry],
    references: list[Entry],
    metric: str,
    looks: dict[str, Style],
) -> tuple[tuple[str, Style], ...]:
    """Lines with bands; gives their labels and looks."""
    for entry in references:
        frames, mean, _, _ = _curve(entry, metric)
        axes.plot(frames, mean, color=INK, lw=0.8, alpha=0.7, dashes=(3, 2), zorder=1)
    for entry in group:
        look = looks[entry.label]
        frames, mean, lo, hi = _curve(entry, metric)
        band = axes.fill_between(frames, lo, hi, color=look.colour, alpha=0.16, lw=0)
        band.set_gid(f"{look.mark}-band")
        dots = {"marker": ".", "ms": 3} if len(frames) < 3 else {}
        line = axes.plot(frames, mean, color=look.colour, alpha=look.strength, lw=1.5, **dots)
        line[0].set_dashes(look.dashes or (None, None))
        line[0].set_gid(look.mark)
    return tuple((entry.label, looks[entry.label]) for entry in group)


def _axis_label(entries: Sequence[Entry], metric: str) -> str:
    facts = metric_facts(entries)[metric]
    unit = f", {facts['unit']}".replace("^2", "²") if facts["unit"] else ""
    return f"{metric.replace('_', ' ')}{unit} {'↑' if facts['higher_is_better'] else '↓'}"


def _has_curve(entry: Entry, metric: str) -> bool:
    return any(v is not None for v in entry.result["curves"].get(metric, {}).get("mean", ()))


def _curve(entry: Entry, metric: str) -> tuple[np.ndarray, ...]:
    """Frames that have a value, their means, and their bounds (the mean where there are none)."""
    curve = entry.result["curves"][metric]
    mean, lo, hi = (np.array(curve[name], dtype=float) for name in ("mean", "lo", "hi"))
    frames = np.flatnonzero(~np.isnan(mean))
    lo, hi = (np.where(np.isnan(bound), mean, bound) for bound in (lo, hi))
    return frames, mean[frames], lo[frames], hi[frames]


def _limits(entries: Sequence[Entry], metric: str) -> tuple[float, float]:
    """Equal limits for all panels of a metric."""
    values = [bound for entry in entries for part in _curve(entry, metric)[1:] for bound in part]
    low, high = min(values, default=0.0), max(values, default=1.0)
    spare = 0.04 * (high - low) or 0.1 * math.fabs(high) or 0.1
    return low - spare, high + spare
