"""Rows of some heads stored with codecs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kv.cache.host import compact
from lightning_kv.cache.rows import Group, Segment, picked


def coded(
    group: Group, masks: list[Tensor], counts: tuple[int, ...], codecs: list[str], room: int
) -> Group:
    """Some heads with so many of their plain rows ``[1 or h, n]`` encoded, codec by codec."""
    if not any(counts):
        return group
    split, length = len(group) - group.plain.length, group.plain.length
    rest = ~torch.stack(torch.broadcast_tensors(*masks)).any(0)
    hits = [compact(mask, count) for mask, count in zip(masks, counts, strict=True)]
    miss = compact(rest, length - sum(counts))
    plain = Segment(
        {name: x[:, :length].contiguous() for name, x in group.plain.rows.items()}, length
    )
    coded = list(group.coded)
    for hit, codec in zip(hits, codecs, strict=True):
        if not hit.shape[1]:
            continue
        chosen = plain.taken(None, hit)
        fresh = Segment.encoded(chosen.rows["k"], chosen.rows["v"], codec)
        joins = coded and coded[-1].joins(fresh)
        coded.append(coded.pop().joined(fresh) if joins else fresh)
    front = torch.arange(split, device=miss.device).unsqueeze(0)
    lines = max(len(x) for x in (*hits, miss))
    parts = [front, *(x + split for x in (*hits, miss))]
    order = torch.cat([x.expand(lines, -1) for x in parts], dim=1)
    meta = {name: picked(x, None, order) for name, x in group.meta.items()}
    return Group(group.heads, coded, plain.taken(None, miss, room), meta)
