"""A window of rolling first frames, rows that future queries will want, and the newest chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_kv.cache.decisions import Retention, Sums
from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.archived import ArchivingPart, played
from lightning_kv.policies.budgets import part_of
from lightning_kv.policies.checks import between, choice, portion
from lightning_kv.policies.future_score import update_query_means
from lightning_kv.policies.part import Preset
from lightning_kv.policies.retain.echo.picking import singles


@dataclass(frozen=True)
class EchoForcing(ArchivingPart):
    """Read first frames that roll, rows that queries to come will want, and the newest chunk.

    Echo-Forcing (arXiv 2605.16003), without its interactive part. Once the history exceeds the
    budget, each chunk reads a window made when it opens, side by side: ``cycle`` slots in which the
    first frames play forwards and backwards, a chunk further every chunk; single rows; the newest
    chunk. The rows come from as many frames before that chunk as the budget has, ranked for all
    heads together by the future-query score, with means of the clean queries up to the first full
    window. Its second term fades as the noisy queries of now become unlike these means.

    Ours: only frames that can come back are archived: nearly twice the budget, which is the window,
    lies beside it. Rows keep their place in the frame (the release's: ``place: slot``). The slot
    says which frame plays there, so any chunk length works. A prompt switch changes nothing.

    Args:
        cycle: First frames that roll: frames, or a share of the budget beyond the newest chunk.
        offsets: Frames ahead at which queries are asked; powers of two within the window if empty.
        drift: λ of the second term's weight ``exp(-λ (1 - cosine))``.
        reuse: How often a row can win; 0 for no limit.
        place: Where single rows stand in the frame: their ``own`` place, or that of their ``slot``.
    """

    name: ClassVar[str] = "echo-forcing"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "echo-forcing",
            "Read rolling first frames, rows that future queries will want, and the newest chunk; "
            "saves memory once a video is longer than its archive (55 frames at 18f).",
            "Echo-Forcing, arXiv 2605.16003",
            ("memory", "reads"),
            {"retain": {"part": "echo-forcing", "budget": "18f"}},
            "18f, and 30 more in the archive: a window of 21, 12 of it rolling",
        ),
    )
    moments: ClassVar[tuple[str, ...]] = ("commit", "open")
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    cycle: float = 0.8
    offsets: tuple[int, ...] = ()
    drift: float = 3.0
    reuse: int = 8
    place: str = "own"

    def __post_init__(self) -> None:
        portion(self, "cycle")
        between(self, 0, None, "drift", "reuse")
        choice(self, place=("own", "slot"))

    def smallest(self, chunk: int) -> int:
        """The newest chunk, what rolls, and one frame of rows."""
        return chunk + 1 + (self.cycle if isinstance(self.cycle, int) else 0)

    def rolling(self, window: int, chunk: int) -> int:
        """Frames that roll."""
        return min(part_of(self.cycle, window - chunk), window - chunk - 1)

    def held(self, window: int, chunk: int) -> int:
        """The archive has what rolls, and as many candidates as the window has frames."""
        return 2 * window + self.rolling(window, chunk)

    def observe(self, view: PassView, state: Any) -> None:
        """Means of the clean queries, up to the first full window."""
        if self.budget is not None:
            until = self.window(view, state) + (view.geometry.chunk or view.query_frames)
            update_query_means(view, state, until)

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Put aside what is no longer new; the window of the chunk is forgotten."""
        step, chunk = views[0].step, views[0].geometry.chunk
        first = step.final[-1] + 1 - chunk
        if self.budget is None or first + chunk <= self.window(views[0], state):
            return [None] * len(views)
        window, genuine, state["first"] = state["window"], state.get("first", 0), first
        cycle, out = self.rolling(window, chunk), []
        for view in views:
            ids, aside = view.frame_id, view.archive.frame_id
            useful = (ids >= genuine) & (ids < first) & ((ids < cycle) | (ids >= first - window))
            gone = (aside >= cycle) & (aside < first - window) if len(view.archive) else None
            out.append(Retention(archive=useful, discard=gone, keep=ids >= first))
        return out

    def open(self, view: PassView, state: Any) -> Retention | None:
        """Fill the window of a chunk: first frames, then single rows, before the newest chunk."""
        if "first" not in state:
            return None
        window, tokens, aside = state["window"], view.geometry.tokens, view.archive
        chunk = view.step.start - state["first"]
        cycle = self.rolling(window, chunk)
        frames = [played(view.step.start - window + slot, cycle) for slot in range(cycle)]
        index = upload([aside.frames.index(f) for f in frames], aside.frame_id, torch.int64)
        index = (index.unsqueeze(1) * tokens + torch.arange(tokens, device=view.device)).flatten()
        index = torch.cat([index, singles(self, view, state, (window - chunk - cycle) * tokens)])
        slot = torch.arange(len(index), device=view.device)
        time = view.step.query_times[0] - window + slot.div(tokens, rounding_mode="floor")
        place = aside.place[:, index]
        if self.place == "slot":
            place = view.geometry.places(view.device)[slot % tokens].to(place).unsqueeze(0)
        pairs = (index + len(view)).unsqueeze(0), slot.unsqueeze(0)
        ids, time = aside.frame_id[:, index].long(), time.unsqueeze(0).to(view.time)
        return Retention(sums=Sums(*pairs, torch.ones_like(time), ids, time, place))
