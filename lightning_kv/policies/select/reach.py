"""Read what is in reach of a query whose length changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.view import PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class Reach(SelectPart):
    """Read the newest frames that fit into a reach together with the query, and a sink.

    Rolling Forcing (arXiv 2509.25161): with many chunks in flight little room is left for history,
    in a commit pass there is more. As in the authors' code, the sink takes its share of the reach
    while chunks are denoised, and a commit pass reads the newest frames alone.

    Args:
        reach: Frames that attention spans, the query included.
        sink: First frames of the video that denoising passes read.
    """

    name: ClassVar[str] = "reach"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "rolling-forcing",
            "Keep the first chunk and the newest, read what shares a reach of 21 frames with the "
            "chunks in flight, the first moved up.",
            "Rolling Forcing, arXiv 2509.25161",
            ("memory", "reads"),
            {
                "retain": {"part": "window", "sink": 3, "budget": "21f"},
                "select": {"part": "reach", "reach": 21, "sink": 3},
                "positions": {"part": "sink-lag", "sink": 3, "lag": 21, "to": "end"},
            },
            "reach 21 with 15 in flight: 3f of anchor, 3f of history; 18f in the commit pass",
        ),
    )
    limited: ClassVar[bool] = False
    reach: int = 21
    sink: int = 3
    refresh: str = "pass"

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "reach")
        between(self, 0, self.reach - 1, "sink")
        if self.refresh != "pass":
            raise ValueError(
                f"The select part 'reach' has refresh={self.refresh!r}. It chooses in every pass: "
                "leave it out."
            )

    def pick(self, view: PassView, state: Any) -> Selection | None:
        """Frames by their age; everything where the history is short."""
        sink = self.sink if view.step.phase == "denoise" else 0
        room = max(0, self.reach - view.query_frames - sink)
        read = tuple(f for f in view.frames if f >= view.step.start - room or f < sink)
        return None if len(read) == len(view.frames) else Selection(frames=read)
