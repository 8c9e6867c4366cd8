"""A figure as inline SVG that takes the colours and the font of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

INK, GRID, PAPER = "#010203", "#040506", "#070809"  # stand for the page's own colours
WIDTH = 4.2  # inches; a page shows an inch as 96 pixels, or a few more or less


@contextmanager
def figure(height: float) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in the looks of the page.

    Args:
        height: Inches; every figure is as wide as the others.
    """
    import matplotlib
    from matplotlib.figure import Figure

    looks = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 8.5,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
    }
    with matplotlib.rc_context(looks):
        drawn = Figure((WIDTH, height), layout="constrained")
        yield drawn, drawn.subplots()


def to_svg(drawn: Any, name: str, notes: dict[str, str]) -> str:
    """The ``<svg>`` element of a figure, fit to stand in a page beside others.

    Args:
        drawn: The figure.
        name: Name of the chart: its ids end in it, so that they are unique in a page.
        notes: What to say when a pointer rests on a mark, by the mark's id.
    """
    file = io.StringIO()
    drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    for gid, note in notes.items():
        mark = f'<g id="{gid}">'
        text = text.replace(mark, f"{mark}<title>{escape(note)}</title>", 1)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())
    text = re.sub(r'\bid="([^"]+)"', rf'id="\1--{slug}"', text)
    text = re.sub(r'(href="#|url\(#)([^")]+)', rf"\1\2--{slug}", text)
    for stand_in, colour in ((INK, "currentColor"), (GRID, "var(--grid)"), (PAPER, "var(--paper)")):
        text = text.replace(stand_in, colour)
    return text
