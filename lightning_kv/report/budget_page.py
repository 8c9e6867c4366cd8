"""A page about head budgets: the map of layers by heads, layer means, and what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_kv.report.page import templates
from lightning_kv.report.pictures import READ
from lightning_kv.report.svg import figure, to_svg
from lightning_kv.utilities.files import write_atomic
from lightning_kv.utilities.formatting import several

Rows = Sequence[Sequence[int]]
LIGHT = (238, 244, 251)
WRITTEN = 16  # heads of a layer: with more, numbers do not fit into the cells


def shade(frames: int, low: int, high: int) -> tuple[str, str]:
    """Colours of a budget and of what is written on it, from light to strong.

    Args:
        frames: The budget.
        low: The least of the map.
        high: The most.
    """
    part = (frames - low) / (high - low) if high > low else 0.0
    mixed = [round(a + part * (b - a)) for a, b in zip(LIGHT, READ, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#ffffff" if part > 0.55 else "#1b1f24"


def write_budget_page(
    path: Path, title: str, sentences: Sequence[str], budgets: Rows, command: str
) -> None:
    """Write it as one self-contained HTML file.

    Args:
        path: File to write.
        title: Its heading.
        sentences: What is predicted, the most important first.
        budgets: Frames of each head, a row per layer.
        command: What writes the page again.
    """
    text = (
        templates()
        .get_template("budgets.html.j2")
        .render(
            title=title,
            sentences=sentences,
            map=map_of(budgets),
            layers=layers_of(budgets),
            budgets=budgets,
            command=command,
        )
    )
    write_atomic(path, text)


def map_of(budgets: Rows) -> str:
    """A cell for each head: layers from top to bottom, the stronger the more frames."""
    from matplotlib.patches import Rectangle

    layers, heads = len(budgets), len(budgets[0])
    low, high = min(map(min, budgets)), max(map(max, budgets))
    notes = {}
    with figure(_height(layers)) as (drawn, axes):
        axes.grid(visible=False)
        for layer, row in enumerate(budgets):
            for head, frames in enumerate(row):
                fill, ink = shade(frames, low, high)
                name = f"head-{layer}-{head}"
                axes.add_patch(Rectangle((head, layer), 0.96, 0.94, color=fill, lw=0, gid=name))
                where = f"layer {layer + 1}, head {head + 1}"
                notes[name] = f"{where}: {several(frames, 'frame')}"
                if heads <= WRITTEN:
                    at = (head + 0.48, layer + 0.5)
                    axes.text(*at, str(frames), color=ink, ha="center", va="center", size=7)
        _number(axes, layers, heads)
        return to_svg(drawn, "map", notes)


def layers_of(budgets: Rows) -> str:
    """The mean of each layer as a bar, in the order of the map."""
    means = [sum(row) / len(row) for row in budgets]
    with figure(_height(len(means))) as (drawn, axes):
        places = [layer + 0.5 for layer in range(len(means))]
        bars = axes.barh(places, means, 0.8, color="#{:02x}{:02x}{:02x}".format(*READ))
        notes = {}
        for layer, (bar, mean) in enumerate(zip(bars, means, strict=True)):
            bar.set_gid(f"layer-{layer}")
            notes[f"layer-{layer}"] = f"layer {layer + 1}: {mean:.3g} frames"
        axes.axvline(sum(means) / len(means), color="#e07b12", lw=1, ls=(0, (4, 2)))
        axes.set_xlabel("mean history frames of the heads")
        axes.grid(visible=False, axis="y")
        _number(axes, len(means), None)
        return to_svg(drawn, "layers", notes)


def _height(layers: int) -> float:
    """Inches of both figures: their layers stand beside each other."""
    return min(9.0, 0.7 + 0.16 * max(layers, 4))


def _number(axes, layers: int, heads: int | None) -> None:
    """Layers down from 1, and heads along from 1, not more of them than can be read."""
    step = -(-layers // 30)
    axes.set_ylim(layers, 0)
    axes.set_yticks([k + 0.5 for k in range(0, layers, step)], range(1, layers + 1, step))
    axes.set_ylabel("layer")
    if heads is None:
        return
    step = -(-heads // 20)
    axes.set_xlim(0, heads)
    axes.set_xticks([k + 0.5 for k in range(0, heads, step)], range(1, heads + 1, step))
    axes.set_xlabel("head")
