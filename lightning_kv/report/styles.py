"""One look per policy, the same in every chart: a hue per family, stronger for larger budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_kv.report.entries import Entry, families

COLOURS = (
    *("#3a7bd5", "#e07b12", "#2a9d5c", "#d1495b", "#8a5fd0"),
    *("#14a0b5", "#b58900", "#d45fb0", "#6f7f8f", "#7d9b24"),
)
MARKERS = "osD^v"
DASHES = ((1.2, 1.2), (4, 1.5), ())  # small, middle, large budget; few budgets start at the end


@dataclass(frozen=True)
class Style:
    """How one policy looks in every chart.

    Args:
        number: Of its family, counted from 0.
        place: Of the policy in its family, counted from 0.
        colour: Of its family.
        marker: Of its family.
        dashes: On and off lengths of its line; empty for a solid one.
        strength: Opacity, less for a smaller budget.
    """

    number: int
    place: int
    colour: str
    marker: str
    dashes: tuple[float, ...]
    strength: float

    @property
    def mark(self) -> str:
        """Start of the ids of its marks."""
        return f"policy-{self.number}-{self.place}"


def styles(entries: Sequence[Entry]) -> dict[str, Style]:
    """Looks by label: a hue per family, stronger and more solid for larger budgets."""
    found = {}
    for number, group in enumerate(families(entries).values()):
        for place, entry in enumerate(group):
            left = len(group) - 1 - place
            found[entry.label] = Style(
                number,
                place,
                COLOURS[number % len(COLOURS)],
                MARKERS[number // len(COLOURS) % len(MARKERS)],
                DASHES[max(len(DASHES) - 1 - left, 0)],
                max(1 - 0.18 * left, 0.4),
            )
    return found
