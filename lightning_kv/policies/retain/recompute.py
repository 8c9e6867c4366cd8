"""Before each chunk, encode the first frame and the newest ones anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_kv.cache.decisions import Rebuild
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class Recompute(RetainPart):
    """Nothing is kept: the first frame and the newest ones are encoded anew for every chunk.

    Krea Realtime 14B (github.com/krea-ai/realtime-video). Once a chunk is final, memory is cleared,
    and of a budget of n frames the first latent and the newest n - 1 go through the model again at
    t = 0, in chunks that read those before them, at rotary times side by side right before the next
    chunk. So keys and values never carry what dropped frames did to them, at the price of one or
    more passes for every chunk (``rebuilt_frames`` counts them).

    Ours: the release encodes the decoded pixels of its oldest frame as a new first latent once the
    start has left the window; a cache has no pixels, so the first latent of the video stays, which
    is what the release does with ``keep_first_frame``. As long as all frames fit, their rows are
    those of the commit passes, and nothing is encoded. At a prompt switch all is encoded again
    under the new prompt.

    Args:
        budget: Frames that are encoded, the first one included (the release's
            ``kv_cache_num_frames``); the same number for all heads.
    """

    name: ClassVar[str] = "recompute"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "recompute",
            "Keep nothing: encode the first frame and the newest ones anew before each chunk.",
            "Krea Realtime 14B, no arXiv id",
            ("memory", "reads"),
            {"retain": {"part": "recompute", "budget": "3f"}},
            "3f",
        ),
    )

    def check(self, *_: Any) -> None:
        """The same frames are encoded for all heads."""
        self.evenly()

    def smallest(self, chunk: int) -> int:
        """The first frame and the newest."""
        return 2

    def commit(self, views: list[CacheView], state: Any) -> Rebuild | None:
        """The first frame and the newest once they are not all."""
        made = views[0].step.final[-1] + 1
        return None if self._fits(views[0], made) else self._anew(views[0], made)

    def event(self, event: Any, views: list[CacheView], state: Any) -> Rebuild | None:
        """All that is held, under the new prompt."""
        made = views[0].step.start
        return self._anew(views[0], made) if event.kind == "prompt_switch" and made else None

    def _fits(self, view: CacheView, made: int) -> bool:
        return self.budget is None or made <= int(self.budget.frames(view))

    def _anew(self, view: CacheView, made: int) -> Rebuild:
        size = made if self._fits(view, made) else int(self.budget.frames(view))
        frames = (0, *range(made - size + 1, made))
        return Rebuild(frames, times=tuple(float(made - size + i) for i in range(size)))
