"""Keep a few summaries of frames, fine for what is near and coarse for what is far."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import Preset
from lightning_kv.policies.summaries import Summary, summarised


@dataclass(frozen=True)
class FadeMem(RetainPart):
    """Keep a few summaries of frames, fine for what is near and coarse for what is far.

    FadeMem (arXiv 2606.10671). Frames join one list; when it is full, those two neighbours become
    one whose ages, warped by a power, are closest, the newest pair left out. A summary is the
    weighted mean of keys and values at equal places, keys without their rotation in time, and lies
    at the mean time of its frames. The first frame takes in its neighbour and stays as it is.

    Ours: frames join when their chunk is committed, not in the first pass of the next one, with
    their ages there: reads are the same, and less is held. The released code stops at its first
    merge, for a name that is not defined.

    Args:
        warp: Power of the ages that are compared, above 0; 1 takes them as they are.
        spread: Power of the number of frames of a summary, which is its weight in a mean.
    """

    name: ClassVar[str] = "fade-mem"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "fade-mem",
            "Keep the first frame and merge neighbours of other frames, the older the more.",
            "FadeMem, arXiv 2606.10671",
            ("memory", "reads"),
            {"retain": {"part": "fade-mem", "budget": "12f"}, "positions": "faded"},
            "12f: 12 summaries, the first frame among them; warp 0.3",
        ),
    )
    warp: float = 0.3
    spread: float = 0.5

    def __post_init__(self) -> None:
        between(self, 1e-3, None, "warp")
        between(self, 0, None, "spread")

    def check(self, *_: Any) -> None:
        """All heads have the same budget."""
        self.evenly()

    def smallest(self, chunk: int) -> int:
        """The first and the newest frame."""
        return 2

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None] | None:
        """The new frames join the list, the same in all layers and heads."""
        view, step = views[0], views[0].step
        slots = len(view.frames)
        if self.budget is not None:
            slots = max(self.rows(view)[0] // view.geometry.tokens, self.smallest(0))
        entries, start = state.get("entries", []), step.final[-1] + 1
        for frame in step.final:
            entries = [*entries, Summary(frame, frame, 1, ((frame, 1.0),))]
            while len(entries) > slots:
                entries = self.merged(entries, start)
        state["entries"] = [Summary(e.frame, e.centre, e.span, ((e.frame, 1.0),)) for e in entries]
        if len(entries) == len(view.frames):
            return None
        return [summarised(view, entries)] * len(views)

    def merged(self, entries: list[Summary], start: int) -> list[Summary]:
        """The list with the two closest of its neighbours as one, as seen from a frame."""
        age = [(start - entry.centre) ** self.warp for entry in entries]
        gaps = [abs(a - b) for a, b in pairwise(age[:-1])]
        i = gaps.index(min(gaps))
        a, b = entries[i : i + 2]
        span = a.span + b.span
        if not i:
            return [Summary(a.frame, a.centre, span, a.parts), *entries[2:]]
        share = a.span**self.spread, b.span**self.spread
        parts = [
            (frame, part * own / sum(share))
            for entry, own in zip((a, b), share, strict=True)
            for frame, part in entry.parts
        ]
        centre = round((a.span * a.centre + b.span * b.centre) / span)
        return [*entries[:i], Summary(a.frame, centre, span, tuple(parts)), *entries[i + 2 :]]
