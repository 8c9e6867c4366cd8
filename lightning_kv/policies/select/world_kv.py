"""Read the first frames, the newest, and chunks that were seen from nearby."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.host import send, upload
from lightning_kv.cache.view import PassView
from lightning_kv.policies.base import CachePolicy, SelectPart
from lightning_kv.policies.budgets import least_with, part_of
from lightning_kv.policies.checks import between, choice, portion, same
from lightning_kv.policies.chunk_distance import key_distance, pose_distance
from lightning_kv.policies.part import Preset
from lightning_kv.policies.retain.half_chunks import HalfChunks
from lightning_kv.policies.scored import top_units


@dataclass(frozen=True)
class WorldKV(SelectPart):
    """Read the first frames, the newest, and chunks that were seen from nearby.

    WorldKV (arXiv 2605.22718). For each new chunk, once for all layers, chunks are read whose mean
    camera pose is nearest to its own: half squared distance, half angle, each over its largest.

    Ours: until more is held than the budget, all is read. Recent frames are read however short the
    clip; ties go to the older chunk. Chunks of other sizes count as old once none of their frames
    is recent. Read chunks keep their own times: the authors' option that moves them is left out.

    Args:
        by: ``pose`` needs the side input ``pose`` (camera to world, ``[F, 4, 4]``); ``keys`` does
            without: mean keys of chunks, in the first layer, like those of the newest.
        sink: First frames that are always read; below 1 a share of the budget.
        recent: Newest frames that are read, the query included.
        close_gap: The newest old chunk may be read too; the authors' code leaves it out.
        start: ``budget``: when more is held than the budget; ``paper``: with the first old chunk.
    """

    name: ClassVar[str] = "world-kv"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "world-kv",
            "Keep two thirds of the tokens of every old chunk; read the first frames, the newest, "
            "and chunks seen from a camera pose nearby.",
            "WorldKV, arXiv 2605.22718",
            ("reads",),
            {"retain": "half-chunks", "select": {"part": "world-kv", "budget": "18f"}},
            "18f: 3 first frames, 6 chunks of 3 halved to 2f each, 3 newest; on LingBot-World",
        ),
    )
    waits: ClassVar[bool] = True
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    by: str = "pose"
    sink: float = 0.16
    recent: int = 6
    close_gap: bool = False
    start: str = "budget"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, by=("pose", "keys"), start=("budget", "paper"), refresh=("chunk",))
        portion(self, "sink")
        between(self, 1, None, "recent")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The camera's pose."""
        return ("pose",) if self.by == "pose" else ()

    def check(self, *_: Any) -> None:
        """All heads have the same budget."""
        self.evenly()

    def suits(self, policy: CachePolicy) -> None:
        """Recent frames are those that memory keeps whole; its sink is no share of a budget."""
        if isinstance(policy.retain, HalfChunks):
            same(self, policy.retain, "recent")

    def smallest(self, chunk: int) -> int:
        """The sink and recent history, or one frame."""
        return max(1, least_with(self.sink, max(0, self.recent - chunk)))

    def observe(self, view: PassView, state: Any) -> None:
        """Where chunks begin."""
        if view.layer == 0:
            state.setdefault("starts", []).append(view.step.final[0])

    def pick(self, view: PassView, state: Any) -> Selection | None:
        """Frames of the sink, the nearest chunks, and recent ones."""
        if self.budget is None or not view.frames or (self.start == "budget" and self.fits(view)):
            return None
        starts, tokens, begin = state["starts"], view.geometry.tokens, view.step.start
        rows = self.rows(view)[0]
        sink = part_of(self.sink, rows / tokens)
        chunk = min(view.geometry.chunk or view.query_frames, view.query_frames)
        late = max(0, begin - max(0, self.recent - chunk))
        ends = [*starts[1:], begin]
        old = [i for i, first in enumerate(starts) if first >= sink and ends[i] <= late]
        old = old if self.close_gap else old[:-1]
        if not old:  # as much as fits
            late = begin - max(0, rows // tokens - min(sink, begin))
            near = tuple(f for f in view.frames if f < sink or f >= late)
            return None if self.fits(view) else Selection(frames=near)
        chunks = [range(starts[i], ends[i]) for i in old]
        if view.layer == 0:
            state["near"] = -self.distance(view, chunks, range(starts[-1], begin))
        own = [bisect_right(starts, frame) - 1 for frame in view.frames]
        own = upload([old.index(c) if c in old else len(old) for c in own], view.time, torch.int64)
        held = view.rows_per_frame.amax(0)
        always = upload([f < sink or f >= late for f in view.frames], view.time, torch.bool)
        size = held.new_zeros(len(old) + 1).scatter_add(0, own, held)[:-1].view(1, 1, -1)
        room = (rows - (held * always).sum()).view(1, 1)
        found = top_units(state["near"].view(1, 1, -1), room, size < 0, size)
        chosen = torch.nn.functional.pad(found[0, 0], (0, 1)).gather(0, own)
        return Selection(frames=(chosen | always).view(1, 1, -1))

    def distance(self, view: PassView, chunks: Sequence[range], newest: Sequence[int]) -> Tensor:
        """Of each chunk from the one that asks, or by keys from the newest that is held."""
        if self.by == "keys":
            return key_distance(view, chunks, newest)
        return pose_distance(send(view.inputs["pose"], view.query), chunks, view.step.frames)
