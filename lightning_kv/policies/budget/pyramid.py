"""More frames for the lower layers, fewer for the upper ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import BudgetPart, Preset


@dataclass(frozen=True)
class Pyramid(BudgetPart):
    """More for the lower layers, fewer for the upper ones, the amount on average.

    PyramidKV (arXiv 2406.02069): attention narrows from layer to layer. Every layer keeps its
    newest rows; of what the amount leaves beside them, the last layer gets a share of 1 / ``beta``,
    the first as much above the mean as that is below it, and layers between lie on a line.

    Ours: shares are rounded to whole frames (tokens, for an amount in tokens) so that their sum is
    that of the amount: down, and what is left goes to the largest remainders. A layer may be given
    more than there is yet, where the paper, which compresses once, would hand it to others.

    Args:
        amount: Mean over the layers.
        beta: What the last layer gets of the mean beside the newest rows is 1 / ``beta``.
        least: What every layer keeps before the rest is divided, as an amount of the same unit; the
            newest chunk where None. At least what the part protects.
    """

    name: ClassVar[str] = "pyramid"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "pyramid-kv",
            "Keep the frames that the newest chunk looks at, more of them in lower layers; drop "
            "the others.",
            "PyramidKV, arXiv 2406.02069",
            ("memory", "reads"),
            {"retain": {"part": "snap-kv", "budget": {"part": "pyramid", "amount": "9f"}}},
            "beta 20, 64 to 2048 tokens of a text",
        ),
    )
    beta: float = 20.0
    least: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "beta")
        if self.least is None:
            return
        most, least = Amount.parse(self.amount), Amount.parse(self.least)
        if most.unit != least.unit or most.value < least.value or most.unit not in "ft":
            raise ValueError(
                f"A pyramid of {self.amount} with least: {self.least} does not work. Give both as "
                "frames or both as tokens, the least not larger: amount: 9f, least: 3f."
            )

    def check(self, geometry: Geometry, least: int) -> None:
        """No layer gets less than what is protected.

        Raises:
            ValueError: The last one does.
        """
        amount, step = Amount.parse(self.amount), self._step(geometry)
        unit = amount.unit
        if unit not in "ft" or amount.value * step < least:
            return
        given = min(self._divided(geometry, amount.value, geometry.chunk or least))
        if given < least:
            raise ValueError(
                f"The last layer of a pyramid of {self.amount} gets {given:g} frames, but {least} "
                f"are protected in every layer. Give least: {round(least / step)}{unit}."
            )

    def allowed(self, view: CacheView) -> tuple[float, ...]:
        """The layer's share, in frames."""
        chunk = view.geometry.chunk or view.query_frames
        value = self.frames(view) / self._step(view.geometry)
        return (self._divided(view.geometry, value, chunk)[view.layer],)

    def _step(self, geometry: Geometry) -> float:
        """What is divided, in frames: one token or one frame."""
        return 1 / geometry.tokens if Amount.parse(self.amount).unit == "t" else 1.0

    def _divided(self, geometry: Geometry, amount: float, chunk: int) -> tuple[float, ...]:
        """Frames of each layer, from an amount in its own unit."""
        step = self._step(geometry)
        least = chunk / step if self.least is None else Amount.parse(self.least).value
        return tuple(
            n * step for n in pyramid(geometry.layers, amount, min(least, amount), self.beta)
        )


@lru_cache
def pyramid(layers: int, amount: float, least: float, beta: float) -> tuple[int, ...]:
    """Whole numbers that fall on a line from layer to layer; ``amount`` is their mean."""
    exact = line(layers, amount, least, beta)
    whole = [math.floor(value + 1e-9) for value in exact]
    order = sorted(range(layers), key=lambda layer: (whole[layer] - exact[layer], layer))
    for layer in order[: math.floor(layers * amount + 1e-6) - sum(whole)]:
        whole[layer] += 1
    return tuple(whole)


def line(layers: int, amount: float, least: float, beta: float) -> list[float]:
    """The share of each layer before it is rounded.

    >>> line(3, 9, 5, 2.0)
    [11.0, 9.0, 7.0]
    """
    low = (amount - least) / beta
    drop = 2 * (amount - least - low) / max(1, layers - 1)
    first = amount + (amount - least - low) if layers > 1 else amount
    return [first - layer * drop for layer in range(layers)]
