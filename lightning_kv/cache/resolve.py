"""From what a policy says to what a kernel takes: masks, biases, and needs that can be met."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.needs import COLLECTORS
from lightning_kv.cache.rows import Group
from lightning_kv.cache.view import CacheView


def resolve(
    selection: Selection | None, view: CacheView, bias: str | None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """A selection as masks and biases per group, each ``[h, Q, N + P]`` or None.

    Raises:
        ValueError: A stream reads nothing at all.
    """
    flight = view.cell.provisional
    read, extra = [], []
    for group in view.groups:
        mask = None if selection is None else _mask(selection, view, group, flight)
        if mask is not None and not bool(mask.any(-1).all()):
            raise ValueError(
                f"A selection leaves a head of layer {view.layer} with nothing to read. "
                "Every stream reads at least one row, usually its own chunk."
            )
        added = _bias(selection, group, flight, bias)
        blocks = max([1, *(x.shape[1] for x in (mask, added) if x is not None)])
        read.append(None if mask is None or bool(mask.all()) else mask.expand(-1, blocks, -1))
        extra.append(None if added is None else added.expand(-1, blocks, -1))
    return read, extra


def _mask(selection: Selection, view: CacheView, group: Group, flight: int) -> Tensor | None:
    heads = list(group.heads)
    if selection.frames is not None:
        chosen = selection.frames[heads]
        index = view.frame_index(group).unsqueeze(1).expand(len(heads), chosen.shape[1], -1)
        past = chosen.gather(2, index)
        if selection.current is None:
            now = past.new_ones(*past.shape[:2], flight)
        else:
            per_frame = flight // selection.current.shape[2]
            now = selection.current[heads].repeat_interleave(per_frame, dim=2)
        return torch.cat([past, now.expand(-1, past.shape[1], -1)], dim=2)
    if selection.rows is None:
        return None
    rows = selection.rows
    mask = torch.stack([rows if isinstance(rows, Tensor) else rows[head] for head in heads])
    missing = len(group) + flight - mask.shape[2]
    return torch.cat([mask, mask.new_ones(*mask.shape[:2], missing)], dim=2)


def _bias(
    selection: Selection | None, group: Group, flight: int, kind: str | None
) -> Tensor | None:
    total = None
    if kind == "log_weight" and bool((group.meta["weight"] != 1).any()):
        weight = group.expanded("weight").log().unsqueeze(1)
        total = torch.nn.functional.pad(weight, (0, flight))
    if selection is not None and selection.bias is not None:
        given = selection.bias
        own = torch.stack([given if isinstance(given, Tensor) else given[h] for h in group.heads])
        total = own if total is None else total + own
    return total


def check_needs(needs: dict[str, dict[str, Any]], tables: dict[str, Any]) -> None:
    """Refuse a policy that asks for a statistic nobody provides.

    Raises:
        ValueError: Names the needs, and what there is.
    """
    missing = sorted(needs.keys() - COLLECTORS.keys() - tables.keys())
    if missing:
        there = sorted(COLLECTORS.keys() | tables.keys())
        raise ValueError(
            f"The policy needs {missing}, which this rollout does not have. "
            f"It can give: {', '.join(there)}. Pass others as `tables` to rollout()."
        )
