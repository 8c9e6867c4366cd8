"""Keep a window and, of what leaves it, tokens that lie where few are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.rotary import rotate, wide
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.density import DensityBank, Kernel, admitted, crowd
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class DensityKV(RetainPart):
    """Keep a window and, of what leaves it, tokens that lie where few are.

    DensityKV (arXiv 2608.27922). Beside sink and window each head has a bank of single tokens, read
    at time 0. Tokens that leave the window enter as far as the density of keys around those in the
    bank stays below a multiple of what it was when they came; where the bank is full, those whose
    density did not, then the densest, make room. Heads of a layer take in the same number.

    Ours: decided when a chunk is committed, not in the first pass of the next: reads are the same,
    and nothing else is held. Samples count for themselves. The window moves by whole chunks at the
    end too. The bank is what the budget leaves; until all is needed, everything stays whole.

    Args:
        sink: First frames of the video, which stay whole.
        local: Frames of the window, the chunk that reads it included.
        growth: How many times its first density a token's may be.
        epsilon: Of the kernel ``(epsilon + distance² / (D / 2)) ** -power``.
        power: Of the kernel.
        floor: Smallest density to start from.
        start: ``budget``: when more is held than the budget allows (then a first chunk fills the
            bank, and the others compete); ``paper``: when frames leave the window.
    """

    name: ClassVar[str] = "density-kv"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "density-kv",
            "Keep the first frame, the newest, and tokens whose keys lie where few are.",
            "DensityKV, arXiv 2608.27922",
            ("memory", "reads"),
            {
                "retain": {"part": "density-kv", "budget": "9f"},
                "positions": {"part": "clamp", "lag": 0.571, "to": "end"},
            },
            "9f: 1 first frame, tokens of 6 frames, 2 newest; growth 2",
        ),
    )
    columns: ClassVar[dict[str, str]] = {"density": "sum", "baseline": "max"}
    sink: int = 1
    local: int = 5
    growth: float = 2.0
    epsilon: float = 1.0
    power: float = 2.0
    floor: float = 1e-6
    start: str = "budget"

    def __post_init__(self) -> None:
        choice(self, start=("budget", "paper"))
        between(self, 0, None, "sink", "local", "growth")
        between(self, 1e-9, None, "epsilon", "power", "floor")

    unit: ClassVar[str] = "token"

    def check(self, *_: Any) -> None:
        """All heads have the same budget."""
        self.evenly()

    def smallest(self, chunk: int) -> int:
        """The sink and the history in the window."""
        return max(1, self.sink + max(0, self.local - chunk))

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None] | None:
        """Let the frames that leave the window compete for the bank, layer by layer."""
        step = views[0].step
        recent = max(0, self.local - (views[0].geometry.chunk or len(step.final)))
        first, last = max(state.get("end", 0), self.sink), step.final[-1] + 1 - recent
        late = self.start == "budget" and "end" not in state  # nothing has been dropped yet
        if self.budget is None or first >= last or (late and self.fits(views[0])):
            return None
        state["end"] = last
        return [self.entered(view, last - first, recent) for view in views]

    def entered(self, view: CacheView, leaving: int, recent: int) -> Retention:
        """Which tokens of so many frames before the recent ones enter the bank, and what goes."""
        tokens, size = view.geometry.tokens, len(view)
        low, high = self.sink * tokens, size - recent * tokens  # rows lie in order of their frames
        middle = high - leaving * tokens
        room = max(0, self.rows(view)[0] - (self.sink + recent) * tokens)
        angles = view.angles(torch.zeros_like(view.time), view.place)
        keys = rotate(wide(view.keys("raw")), angles, view.geometry.rotary.work)
        chunk, near = view.step.final[-1] + 1 - view.step.final[0], Kernel(self.epsilon, self.power)
        if middle == low and leaving > chunk:
            middle = low + min(chunk * tokens, room)
            old = crowd(keys[:, low:middle], near)
            bank = DensityBank(keys[:, low:middle], old, old.clamp_min(self.floor))
        else:
            old = [
                view.field(x)[:, low:middle].expand(view.heads, -1).to(keys) for x in self.columns
            ]
            bank = DensityBank(keys[:, low:middle], *old)
        view.scored += view.heads * (high - middle) * (high - low)
        take, stay, old, new = admitted(bank, keys[:, middle:high], room, self.growth, near)
        density, start, keep = (x.new_zeros(view.heads, size) for x in (old, old, take))
        density[:, low:high] = torch.cat([old, new], 1)
        start[:, low:high] = torch.cat([bank.baseline, new.clamp_min(self.floor)], 1)
        keep[:] = True
        keep[:, low:high] = torch.cat([stay, take], 1)
        time = view.time.clone()
        time[:, low:high] = 0
        return Retention({"density": density, "baseline": start}, time=time, keep=keep)
