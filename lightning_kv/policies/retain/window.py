"""Keep the newest frames, and the first ones as a sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild, Retention
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import choice
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class Window(RetainPart):
    """Keep the newest frames, and the first ones as a sink.

    Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453); without a sink it
    is the rolling cache of Self Forcing (arXiv 2506.08009).

    Args:
        sink: First frames of the video that are never dropped; they count in the budget.
        switch: At a prompt switch, ``keep`` the memory; ``recache``: the frames in reach are
            encoded again under the new prompt in one pass, in which each reads all others and the
            sink, which stays as it is (LongLive, arXiv 2509.22622); ``recache-causal``: the same
            chunk by chunk, without the sink; or ``flush`` all but the sink and the newest frame
            (Infinity-RoPE, arXiv 2511.20649).
    """

    name: ClassVar[str] = "window"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "sliding-window",
            "Keep the newest frames: a rolling cache.",
            "Self Forcing, arXiv 2506.08009",
            ("memory", "reads"),
            {"retain": {"part": "window", "budget": "9f"}},
            "18f: a window of 21 with chunks of 3, no sink",
        ),
        Preset(
            "sink-window",
            "Keep the first 3 frames and the newest.",
            "StreamingLLM, arXiv 2309.17453",
            ("memory", "reads"),
            {"retain": {"part": "window", "sink": 3, "budget": "9f"}},
            "sink of 4 tokens and the newest of a text, at positions side by side",
        ),
        Preset(
            "longlive",
            "Keep the first 3 frames and the newest, encoded again together under the new prompt "
            "at a prompt switch.",
            "LongLive, arXiv 2509.22622",
            ("memory", "reads"),
            {"retain": {"part": "window", "sink": 3, "budget": "9f", "switch": "recache"}},
            "9f: a window of 12 with chunks of 3, sink 3",
        ),
        Preset(
            "infinity-rope",
            "Keep the first frame and the newest, at rotary times side by side, far away after a "
            "scene cut; flush at a prompt switch.",
            "Infinity-RoPE, arXiv 2511.20649",
            ("memory", "reads"),
            {
                "retain": {"part": "window", "sink": 1, "budget": "3f", "switch": "flush"},
                "positions": {"part": "contiguous", "cut": 45},
            },
            "3f: a window of 6 with chunks of 3, sink 1; cut 45",
        ),
    )
    sink: int = 0
    switch: str = "keep"

    def __post_init__(self) -> None:
        choice(self, switch=("keep", "recache", "recache-causal", "flush"))

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The sink."""
        return (view.frame_ids < self.sink).view(1, 1, -1)

    def smallest(self, chunk: int) -> int:
        """The sink, or one frame."""
        return max(self.sink, 1)

    def event(
        self, event: Event, views: list[CacheView], state: Any
    ) -> list[Retention | None] | Rebuild | None:
        """Recache or flush at a prompt switch; nothing else."""
        if event.kind != "prompt_switch" or self.switch == "keep":
            return None
        view = views[0]
        if self.switch == "flush":
            return [Retention(keep=self._newest(view)) for view in views]
        made, chunk = view.step.start, view.geometry.chunk or view.query_frames
        history = made if self.budget is None else min(made, int(self.budget.frames(view)))
        sink = tuple(range(min(self.sink, made)))
        hold = tuple(range(max(self.sink, made - history + len(sink)), made))
        if not hold:
            return None
        reach = range(max(0, made - history - chunk), made)
        if self.switch == "recache-causal":
            return Rebuild(tuple(reach), hold=hold, spare=sink)
        reach = tuple(range(max(self.sink, reach.start + len(sink)), made))
        return Rebuild(reach, hold=hold, spare=sink, together=True, read=True)

    def _newest(self, view: CacheView) -> Tensor:
        """Rows of the sink and of the newest frame of each head, bool ``[1 or H, N]``."""
        ids, present = view.frame_ids, view.present
        last = torch.where(present, ids, -1).amax(-1, keepdim=True) if len(ids) else ids
        return view.rows_of(((ids < self.sink) | (ids == last)) & present)
