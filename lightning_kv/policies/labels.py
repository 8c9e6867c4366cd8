"""Heads by their label, as masks.

Shapes: H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.tables import HeadTable


def heads_of(view: CacheView, labels: HeadTable, *kinds: str) -> Tensor:
    """Heads of the view's layer that have one of some labels, bool ``[H, 1]``."""
    own = [label in kinds for label in labels.rows_for(view.geometry)[view.layer]]
    return upload(own, view._like, torch.bool).unsqueeze(1)


def labelled(
    part: Any,
    kinds: Mapping[str, int] | Sequence[str],
    threshold: float | None = None,
    method: str | None = None,
) -> HeadTable:
    """The setting ``labels`` of a part in words; see :meth:`.HeadTable.labelled`.

    Args:
        part: That has it.
        kinds: The words.
        threshold: Where given, numbers mean the second of two words from there on, else the first.
        method: Whose shipped tables ``auto`` means, or several, see
            :class:`~lightning_kv.policies.tables.HeadTable`; the part's name where not given.
    """
    given = HeadTable.of(part.labels, "labels")
    if threshold is not None and all(isinstance(x, int | float) for x in given.values):
        rows = tuple(tuple(float(x >= threshold) for x in row) for row in given.rows)
        given = replace(given, rows=rows)
    return given.labelled(method or part.name, "labels", kinds)
