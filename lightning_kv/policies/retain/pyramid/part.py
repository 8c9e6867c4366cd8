"""Each head keeps the middle frames that its kind will read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention, Sums
from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.part import Preset
from lightning_kv.policies.retain.pyramid.kinds import PyramidHeads


@dataclass(frozen=True)
class PyramidForcing(PyramidHeads, RetainPart):
    """Wave heads keep all phases of the past, anchor heads every n-th frame, veil heads means.

    Pyramid Forcing (arXiv 2605.13111). All keep their sink and the newest frames. Wave heads also
    keep the newest ``period * slots`` frames, anchor heads the newest ``slots`` frames whose number
    is a multiple of ``stride``. Veil heads merge ``block`` frames once all are there: keys before
    rotation and values, mean over them and over squares of ``patch`` tokens; the newest ``slots``
    blocks stay.

    Ours: nothing is held that no later pass can read, but the frames of a block that is not
    complete (not their sums); a merged row lies in the middle of its square; at the border of an
    odd grid squares are smaller. A block with frames of the sink is not made. A prompt switch
    changes nothing.

    Args:
        patch: Side in tokens of the squares that veil heads merge.
    """

    name: ClassVar[str] = "pyramid-forcing"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "pyramid-forcing",
            "Keep sink and newest frames; by the kind of head also frames of one phase, every "
            "sixth, or means of four.",
            "Pyramid Forcing, arXiv 2605.13111",
            ("memory", "reads"),
            {
                "retain": "pyramid-forcing",
                "select": "pyramid-reads",
                "positions": "pyramid-times",
            },
            "26f for wave heads, 6f of them read; 8f for anchor heads, 5f for veil heads",
        ),
    )
    limited: ClassVar[bool] = False
    patch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "patch")

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Each layer by itself."""
        return [self.keep(view, state) for view in views]

    def keep(self, view: CacheView, state: Any) -> Retention:
        """What later passes can read, and frames that wait for the rest of their block."""
        ids, made, merged = view.frame_id, view.step.final[-1] + 1, self.merged(view)
        newest, done, blocks = (made - 1) // self.stride, made // self.block, ids // self.block
        ways = {
            "wave": ids >= made - self.period * self.slots,
            "anchor": (ids % self.stride == 0) & (ids // self.stride > newest - self.slots),
            "veil": (blocks >= done) | merged & (blocks >= done - self.slots),
        }
        middle = torch.stack([self.of(view, kind) & rows for kind, rows in ways.items()]).any(0)
        sink = (ids < self.sinks(view)) & ~merged
        kept = (sink | self.near(view, made) | middle) & view.valid
        return Retention(sums=self.blocks(view, done), keep=kept)

    def blocks(self, view: CacheView, done: int) -> Sums | None:
        """Merged rows of the blocks that have become complete."""
        first, size = -(-self.sink // self.block), self.block
        low = max(view.step.final[0] // size, first, done - self.slots)
        veil, count = self.of(view, "veil"), done - low
        if count < 1 or "veil" not in self.labels.rows_for(view.geometry)[view.layer]:
            return None
        frames = range(low * size, done * size)
        at = upload([view.frames.index(f) for f in frames], view._like, torch.int64)
        row = Layout.of(view).row.expand(view.heads, -1, -1).index_select(1, at)  # [H, f, T]
        place, tokens, square = self.squares(view)
        squares = len(place)
        block = torch.arange(count, device=row.device).repeat_interleave(size)
        target = block.unsqueeze(1) * squares + square  # [f, T]
        share = (1.0 / (tokens * size))[square].expand_as(target)
        middle = (low + torch.arange(count, device=row.device)) * size + (size - 1) // 2
        middle = middle.repeat_interleave(squares).unsqueeze(0)
        return Sums(
            torch.where(veil.unsqueeze(1), row, -1).flatten(1),
            target.flatten().unsqueeze(0),
            share.flatten().unsqueeze(0),
            torch.where(veil, middle, -1),
            middle.float(),
            place.repeat(count, 1).unsqueeze(0),
        )

    def squares(self, view: CacheView) -> tuple[Tensor, Tensor, Tensor]:
        """The middle of each square ``[G, 2]``, its tokens ``[G]``, and that of each token."""
        rows, columns = view.geometry.grid
        place, wide = view.geometry.places(view.device), -(-columns // self.patch)
        square = place[:, 0] // self.patch * wide + place[:, 1] // self.patch
        every = torch.arange(-(-rows // self.patch) * wide, device=view.device)
        members = (every.unsqueeze(1) == square).float()
        tokens = members.sum(1)
        return members @ place.float() / tokens.unsqueeze(1), tokens, square
