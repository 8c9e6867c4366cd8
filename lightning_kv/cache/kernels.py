"""Attention, by name. All kernels give the same numbers up to rounding.

Shapes: s streams (a head and a block of its queries), t queries of each, n rows that they read, H
heads, T queries, Q blocks of them, M rows of a head, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.rotary import Rotary, rotate_by
from lightning_kv.cache.rows import Group
from lightning_kv.cache.store import LayerStore
from lightning_kv.cache.table import BLOCK

BACKENDS = ("sdpa", "reference")


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's fused kernel over the rows that are read; the others are not touched.

    Args:
        q: ``[s, t, D]``.
        k: ``[s, n, D]``.
        v: ``[s, n, D]``.
        bias: ``[1 or s, n]`` added to the logits, or None.
    """
    mask = None if bias is None else bias.to(q.dtype).expand(len(q), -1)[None, :, None]
    return scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]


def reference(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Full scores, a mask and a softmax in float64: slow and obviously right.

    Args:
        q: ``[H, T, D]``.
        k: ``[H, M, D]``, or ``[H, 1 or Q, M, D]`` where blocks of queries meet other keys.
        v: ``[H, M, D]``.
        read: bool ``[1 or H, 1 or Q, M]``: the rows that each block of T / Q queries sees, or None.
        bias: float, alike.
    """
    query = q.double().unsqueeze(1)  # [H, 1, T, D], or its blocks
    keys = k.double() if k.ndim == 4 else k.double().unsqueeze(1)
    parts = [x.shape[1] for x in (read, bias) if x is not None]
    blocks = max([keys.shape[1], *parts])
    query = query.squeeze(1).unflatten(1, (blocks, -1))  # [H, Q, t, D]
    logits = query @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias.double().unsqueeze(2)
    if read is not None:
        logits = logits.masked_fill(~read.unsqueeze(2), -torch.inf)
    return (logits.softmax(-1) @ v.double().unsqueeze(1)).flatten(1, 2).to(q.dtype)


def known_backend(name: str) -> str:
    """The name, if there is a kernel of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in BACKENDS:
        raise ValueError(f"No attention backend {name!r}. Backends here: {', '.join(BACKENDS)}.")
    return name


class Workspace:
    """Buffers for one layer's copies, filled anew by every layer of every pass."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer of that name; what was in it is lost."""
        size, found = 1, self._buffers.get(name)
        for side in shape:
            size *= side
        fits = found is not None and found.numel() >= size
        if not fits or found.dtype != like.dtype or found.device != like.device:
            self._buffers.pop(name, None)
            self._buffers[name] = found = like.new_empty(size)
        return found[:size].view(shape)

    @property
    def held_bytes(self) -> int:
        """Of all buffers."""
        return sum(x.numel() * x.element_size() for x in self._buffers.values())


@dataclass
class Block:
    """Streams of one group that read equally many rows: one call of a kernel.

    Args:
        group: Index of the group.
        streams: int64 ``[s]``, position in the group x Q + query frame; all where None.
        units: int64 ``[1 or s, m]`` units that are read, those in flight too; all rows, in place,
            where None.
        history: Committed rows that each stream reads.
        size: Rows of a unit.
        time: Rotary times ``[1 or s, history]`` of committed rows, where they are turned.
        place: Their places ``[1 or s, history, 2]``.
        bias: ``[1 or s, rows]``.
        kept: Copies that live as long as the plan.
        lines: The units of all streams by their place in the store, int64 ``[s, m]``.
        stride: Rows of a head there, for which that holds.
    """

    group: int
    streams: Tensor | None
    units: Tensor | None
    history: int
    size: int = 1
    time: Tensor | None = None
    place: Tensor | None = None
    bias: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    lines: Tensor | None = None
    stride: int = 0


@dataclass
class ReadPlan:
    """How one layer of one sample reads, until something changes.

    Args:
        key: What it was made for.
        blocks: Calls of the kernel.
        split: Q: query frames that read differently; 1 where all read the same.
        rows: Committed rows read, summed over heads and query frames, over Q.
        selection: What the select part said.
        lag: What the positions part said.
    """

    key: Any
    blocks: list[Block]
    split: int
    rows: float
    selection: Selection | None = None
    lag: Tensor | None = None

    def read(
        self,
        q: Tensor,
        store: LayerStore,
        work: Workspace | None,
        keep: bool = False,
        own: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Attention of queries ``[H, T, D]``.

        Args:
            q: Rotated.
            store: The layer's rows.
            work: Where copies are made; fresh tensors where None (gradients).
            keep: Let copies live as long as the plan.
            own: Keys and values ``[H, P, D]`` in flight where they are not in the store.
        """
        out = None
        for block in self.blocks:
            group = store.memory.groups[block.group]
            alone = len(group.heads) == store.geometry.heads
            query = q if alone else q.index_select(0, group.index)
            query = query.unflatten(1, (self.split, -1)).flatten(0, 1)
            query = query if block.streams is None else query.index_select(0, block.streams)
            k, v = self._payload(block, group, store, work, keep, own)
            found = sdpa(query, k, v, block.bias)
            if alone and block.streams is None:
                return found.unflatten(0, (-1, self.split)).flatten(1, 2)
            if out is None:
                out = q.new_empty(len(q) * self.split, q.shape[1] // self.split, q.shape[2])
            out.index_copy_(0, self._lines(block, group), found)
        return out.unflatten(0, (-1, self.split)).flatten(1, 2)

    def _lines(self, block: Block, group: Group) -> Tensor:
        streams = block.streams
        if streams is None:
            streams = torch.arange(len(group.heads) * self.split, device=group.index.device)
        head = group.index.index_select(0, streams // self.split)
        return head * self.split + streams % self.split

    def _payload(
        self,
        block: Block,
        group: Group,
        store: LayerStore,
        work: Workspace | None,
        keep: bool,
        own: dict[str, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[s, n, D]`` of a block."""
        if block.kept and work is not None and own is None:
            return self._renewed(block, group, store)
        found = []
        for name in ("k", "v"):
            x = self._source(name, group, store, own)
            if block.units is not None:
                x = self._gathered(name, x, block, work)
            if name == "k" and block.time is not None:
                x = self._turned(x, block, store.geometry.rotary, work)
            found.append(x)
        copied = [
            (name == "k" and block.time is not None) or block.units is not None for name in "kv"
        ]
        lasts = keep and work is not None and own is None and not group.coded
        if lasts and any(copied):
            pairs = zip(("k", "v"), found, copied, strict=True)
            block.kept = {name: x.clone() for name, x, yes in pairs if yes}
        return found[0], found[1]

    def _source(
        self, name: str, group: Group, store: LayerStore, own: dict[str, Tensor] | None
    ) -> Tensor:
        """All rows of a group ``[h, n + P, D]``."""
        if own is None:
            return group.payload(name, store.flight)
        mine = group.of(own[name], store.geometry.heads)
        return torch.cat([group.payload(name), mine], dim=1)

    def _turned(self, x: Tensor, block: Block, rotary: Rotary, work: Workspace | None) -> Tensor:
        """Committed rows at the times at which they are read; the others as they are."""
        out, step = [], max(1, BLOCK // max(1, len(x) * x.shape[2]))
        target = x
        if work is not None and block.units is None:  # the store's own rows are left alone
            target = work.take("k", tuple(x.shape), x)
            target[:, block.history :] = x[:, block.history :]
        for low in range(0, block.history, step):
            rows = slice(low, min(low + step, block.history))
            angles = rotary.angles(block.time[:, rows], *block.place[:, rows].unbind(-1))
            dtype = torch.promote_types(x.dtype, rotary.work)
            new = rotate_by(x[:, rows], angles.cos().to(dtype), angles.sin().to(dtype))
            if work is None:
                out.append(new)
            else:
                target[:, rows] = new
        return target if work is not None else torch.cat([*out, x[:, block.history :]], dim=1)

    def _gathered(self, name: str, x: Tensor, block: Block, work: Workspace | None) -> Tensor:
        heads, _, width = x.shape
        stride = x.stride(0) // width  # rows with the room behind them, so lines can be named
        x = x.as_strided((heads, stride, width), (stride * width, width, 1))
        lines = x.view(heads * stride // block.size, block.size * width)
        if block.stride != stride:
            block.lines, block.stride = self._named(block, heads, stride // block.size), stride
        shape = (block.lines.numel(), lines.shape[1])
        out = None if work is None else work.take(name, shape, x)
        found = torch.index_select(lines, 0, block.lines.flatten(), out=out)
        return found.view(len(block.lines), -1, width)

    def _named(self, block: Block, heads: int, size: int) -> Tensor:
        """Lines of all heads' units one below the other, int64 ``[s, m]``."""
        streams = block.streams
        if streams is None:
            streams = torch.arange(heads * self.split, device=block.units.device)
        head = streams if self.split == 1 else streams // self.split
        return head.unsqueeze(1) * size + block.units

    def _renewed(self, block: Block, group: Group, store: LayerStore) -> tuple[Tensor, Tensor]:
        """What was kept, with the rows in flight of this pass."""
        found = []
        for name in ("k", "v"):
            x = self._source(name, group, store, None)
            kept = block.kept.get(name)
            if kept is None:
                found.append(x)
                continue
            own = x[:, len(group) :]
            if block.units is not None:
                units = block.units[:, block.history // block.size :]
                part = Block(block.group, block.streams, units, 0, block.size)
                own = self._gathered(name, x, part, None)
            kept[:, block.history :] = own
            found.append(kept)
        return found[0], found[1]
