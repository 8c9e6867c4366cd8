"""The clips of a set: what their features may be, in which order they stand, which count once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kv.metrics.functional.moments import as_features
from lightning_kv.metrics.inputs import NOBODY, hint, shown

SAME = 1e-3
"""Share of its length by which a clip's features may differ when it is measured again."""


def in_order(
    name: str, ids: list[int], units: list[int], parts: Sequence[Tensor] | None
) -> list[int]:
    """Places of the clips by id, each once; those without one by what they show.

    Args:
        name: Of the metric, for errors.
        ids: Of the clips.
        units: Of the clips.
        parts: Their features; None where only sums were kept.

    Raises:
        ValueError: An id came twice that must not.
    """

    def key(place: int) -> tuple[int, int, bytes]:
        alone = ids[place] == NOBODY and parts is not None
        return ids[place], units[place], parts[place].cpu().numpy().tobytes() if alone else b""

    kept: list[int] = []
    again, moved, other = [], [], []
    for place in sorted(range(len(ids)), key=key):
        if not kept or ids[place] == NOBODY or ids[place] != ids[kept[-1]]:
            kept.append(place)
            continue
        again.append(ids[place])
        if parts is not None and not _alike(parts[place], parts[kept[-1]]):
            moved.append(ids[place])
        if units[place] != units[kept[-1]]:
            other.append(ids[place])
    if parts is None:
        _refuse(name, again, "came twice, and sums cannot tell which to drop")
    _refuse(name, moved, "came twice with different features")
    _refuse(name, other, "came twice with different units")
    return kept


def _refuse(name: str, ids: list[int], what: str) -> None:
    if ids:
        raise ValueError(
            f"{len(ids)} ids of '{name}' {what}, such as {ids[0]}. Give each clip its "
            "own id, and keep features where a clip may be seen again."
        )


def rows_of(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Features of the windows of each clip, ``[windows, d]``, checked.

    Args:
        features: ``[B, d]``, one row for each clip; or a list of ``[windows, d]``.

    Raises:
        ValueError: As :func:`as_rows`.
    """
    if isinstance(features, list | tuple):
        return [as_rows(rows) for rows in features]
    return list(as_rows(features).split(1))


def as_rows(features: Tensor) -> Tensor:
    """Features as they are kept, float32 ``[N, d]``, checked.

    Raises:
        ValueError: The shape or type is wrong, or a value is not finite.
    """
    if not isinstance(features, Tensor):
        raise ValueError(
            f"These are no features of clips: {shown(features)}. Pass a tensor [clips, d], or a "
            f"list of [windows, d].{hint(features)}"
        )
    if features.dtype == torch.float64:
        raise ValueError(
            "Features are kept in float32, but these are float64. Pass features.float()."
        )
    as_features(features, least=1)
    return features.detach().float()


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(
        ((one - other).norm(dim=1) <= SAME * one.norm(dim=1)).all()
    )


def numbered_units(units: list[int]) -> list[int]:
    """Units counted from 0; a clip that has none is one of its own."""
    known = {unit: number for number, unit in enumerate(sorted({*units} - {NOBODY}))}
    free = iter(range(len(known), len(known) + len(units)))
    return [next(free) if unit == NOBODY else known[unit] for unit in units]
