"""Lines over the length of a clip as inline SVG: a metric at every frame, the time of every chunk.

A few policies share one chart; more get a chart per family, with equal axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_kv.report.entries import Entry, against_reference, families
from lightning_kv.report.styles import Style, styles
from lightning_kv.report.svg import INK, figure, to_svg
from lightning_kv.report.tradeoff_charts import Chart, axis_label

TOGETHER = 4  # lines that one chart can hold


@dataclass(frozen=True)
class Line:
    """One line.

    Args:
        places: Where on the axis it has values.
        mean: Those values.
        lo: Lower bounds of its band; the values themselves where there is none.
        hi: Upper bounds.
    """

    places: NDArray
    mean: NDArray
    lo: NDArray
    hi: NDArray

    @classmethod
    def of(cls, mean: Sequence, lo: Sequence | None = None, hi: Sequence | None = None) -> Line:
        """From a value for each place, None where there is none."""
        values, *bounds = (
            np.array(mean if own is None else own, dtype=float) for own in (mean, lo, hi)
        )
        places = np.flatnonzero(~np.isnan(values))
        bounds = [np.where(np.isnan(bound), values, bound)[places] for bound in bounds]
        return cls(places, values[places], *bounds)


@dataclass(frozen=True)
class Axes:
    """What the axes of a chart say.

    Args:
        name: Of the chart, for its ids.
        along: What a place is.
        up: What a value is.
        rate: Places per second; None for no axis of seconds.
        first: Number of the first place.
        low: Where the upward axis starts; None for a little below the lowest value.
    """

    name: str
    along: str
    up: str
    rate: float | None = None
    first: int = 0
    low: float | None = None


def curves(entries: Sequence[Entry], metric: str, along: str = "latent frame") -> list[Chart]:
    """A metric over the frames of a clip, with bands; the reference is dashed.

    Args:
        entries: Policies.
        metric: Its name.
        along: What a value of a curve belongs to.
    """
    hidden = against_reference(entries, metric)
    lines = {}
    for entry in entries:
        curve = entry.result["curves"].get(metric)
        if curve and not (hidden and entry.is_reference):
            lines[entry.label] = Line.of(curve["mean"], curve["lo"], curve["hi"])
    rates = {entry.rate for entry in entries}
    rate = next(iter(rates)) if len(rates) == 1 else None
    axes = Axes(f"{metric}-curves", along, axis_label(entries, metric), rate)
    return panels(entries, lines, axes)


def chunk_curves(entries: Sequence[Entry], times: dict[str, list[float | None]]) -> list[Chart]:
    """Milliseconds of every chunk, the median over clips.

    Args:
        entries: Policies.
        times: Seconds of their chunks, by label.
    """
    shown = {
        label: Line.of([None if second is None else 1000 * second for second in own])
        for label, own in times.items()
    }
    return panels(
        entries, shown, Axes("chunk-times", "chunk", "ms per chunk, median", None, 1, 0.0)
    )


def panels(entries: Sequence[Entry], lines: dict[str, Line], axes: Axes) -> list[Chart]:
    """Charts of lines: all in one, or one per family.

    Args:
        entries: Policies.
        lines: By label; a policy without one, or with an empty one, is left out.
        axes: What the axes say.
    """
    lines = {label: line for label, line in lines.items() if len(line.places)}
    groups = {
        name: own
        for name, group in families(entries).items()
        if (own := [entry for entry in group if entry.label in lines])
    }
    shown = [entry for group in groups.values() for entry in group]
    references = [e for e in entries if e.is_reference and e.label in lines]
    if len(shown) <= TOGETHER:
        groups = {"": shown} if shown or references else {}
    low, high = _limits(lines)
    limits = (low if axes.low is None else axes.low, high)
    return [
        _panel(title, group, references, lines, (axes, limits, number), styles(entries))
        for number, (title, group) in enumerate(groups.items())
    ]


def _panel(
    title: str,
    group: list[Entry],
    references: list[Entry],
    lines: dict[str, Line],
    frame: tuple[Axes, tuple[float, float], int],
    looks: dict[str, Style],
) -> Chart:
    """One chart."""
    says, limits, number = frame
    with figure(2.2 if title else 2.9) as (drawn, axes):
        axes.set_ylim(limits)
        axes.set_xlabel(says.along)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(says.up)
        for entry in references:
            line = lines[entry.label]
            style = {"color": INK, "lw": 0.8, "alpha": 0.7, "dashes": (3, 2), "zorder": 1}
            axes.plot(line.places + says.first, line.mean, **style)
        for entry in group:
            _draw(axes, lines[entry.label], looks[entry.label], says.first)
        if says.rate:
            _seconds(axes, says.rate)
        legend = tuple((entry.label, looks[entry.label]) for entry in group)
        notes = {look.mark: label for label, look in legend}
        svg = to_svg(drawn, f"{says.name}-{number}", notes)
    return Chart(title, svg, legend)


def _draw(axes: Any, line: Line, look: Style, first: int) -> None:
    """A line with its band."""
    places = line.places + first
    if (line.hi > line.lo).any():
        band = axes.fill_between(places, line.lo, line.hi, color=look.colour, alpha=0.16, lw=0)
        band.set_gid(f"{look.mark}-band")
    dots = {"marker": ".", "ms": 3} if len(places) < 3 else {}
    drawn = axes.plot(places, line.mean, color=look.colour, alpha=look.strength, lw=1.5, **dots)
    drawn[0].set_dashes(look.dashes or (None, None))
    drawn[0].set_gid(look.mark)


def _seconds(axes: Any, rate: float) -> None:
    """An axis of seconds above."""
    above = axes.secondary_xaxis("top", functions=(lambda x: x / rate, lambda x: x * rate))
    above.set_xlabel("seconds")
    above.spines["top"].set_visible(False)


def _limits(lines: dict[str, Line]) -> tuple[float, float]:
    """Equal limits for all charts of a metric."""
    values = [bound for line in lines.values() for part in (line.lo, line.hi) for bound in part]
    low, high = min(values, default=0.0), max(values, default=1.0)
    spare = 0.04 * (high - low) or 0.1 * math.fabs(high) or 0.1
    return low - spare, high + spare
