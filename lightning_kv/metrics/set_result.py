"""What a metric of two sets of clips says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SetResult:
    """What a metric of sets says, with what is needed to believe it.

    Args:
        name: Metric and backbone, such as ``fvd/i3d-k400``.
        value: The distance.
        null: The distance to be expected if both sets came from one population; None where that
            cannot be told.
        standard_error: By the jackknife over the units of the generated clips; None where that
            cannot be told.
        n: Number of generated clips.
        n_real: Number of real clips.
        units: Number of units of the generated clips: so many count as independent.
        units_real: The same of the real ones.
        windows: Number of windows of the generated clips, each with its features.
        windows_real: The same of the real ones.
        recipe: How it was computed; see :func:`check_comparable`.
        status: "ok", or what to beware of.
    """

    name: str
    value: float
    null: float | None
    standard_error: float | None
    n: int
    n_real: int
    units: int
    units_real: int
    windows: int
    windows_real: int
    recipe: str
    status: str


def check_comparable(*results: SetResult) -> None:
    """Refuse to compare results of different recipes.

    Raises:
        ValueError: The recipes differ.

    Example:
        >>> some = SetResult("fvd/x", 1.0, 2.0, 0.1, 8, 8, 8, 8, 8, 8, "clips of 16 frames", "ok")
        >>> check_comparable(some, some)
    """
    recipes = dict.fromkeys(result.recipe for result in results)
    if len(recipes) > 1:
        raise ValueError(
            f"Results of different recipes cannot be compared: {'; '.join(recipes)}. "
            "Compute all of them with the same one."
        )
