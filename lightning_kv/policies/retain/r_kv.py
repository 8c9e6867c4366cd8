"""Keep what the newest chunk looks at and what nothing newer repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, normalize

from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import summed
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import final_mass


@dataclass(frozen=True)
class RKV(UnitPart):
    """Keep what the newest chunk looks at and what nothing newer repeats.

    R-KV (arXiv 2505.24133): ``λ · attention - (1 - λ) · redundancy``. Attention is the mean softmax
    mass from the last queries, max-pooled. Redundancy is the softmax over all that is held of the
    mean cosine of a key with all keys, itself counting 0; each key spares the most recent one among
    those like it, so that the newest of several like keys stays.

    Ours: the last 8 queries become query rows spread over the newest chunk (its last 8 would be a
    corner of a frame), and pooling a square of the frame. A key is like itself, so of two like ones
    the older is charged (the authors' code spares both). Keys are those before rotation: what is
    said twice is redundant, wherever it is said. Frames (the default: cheaper than rows, and not
    clearly worse on the embedded model) get the sum of their rows' attention, of the size of a
    softmax over frames, and are compared by the mean cosine at equal places; rows (the paper's) are
    compared with those around their place in all frames, since all pairs would be too many.

    Args:
        weight: λ, from 0 (only redundancy) to 1 (only attention).
        window: Query rows of the newest chunk, evenly spaced; all where it has no more.
        pool: Side of the pooled square in tokens, odd; 1 for the row alone.
        reach: Tokens up, down, left or right of its place at which a row is compared with others.
        alike: Cosine above which two keys are like each other.
    """

    name: ClassVar[str] = "r-kv"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "r-kv",
            "Keep the frames that the newest chunk looks at and that repeat no other, and the "
            "chunk; drop the others.",
            "R-KV, arXiv 2505.24133",
            ("memory", "reads"),
            {"retain": {"part": "r-kv", "budget": "9f"}},
            "single tokens of a text: 128, the last 8 look and stay, 7 are pooled, weight 0.1",
        ),
    )
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    weight: float = 0.1
    window: int = 520
    pool: int = 3
    reach: int = 2
    alike: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, 1, "weight", "alike")
        between(self, 1, None, "window")
        between(self, 0, None, "reach")
        choice(self, pool=tuple(range(1, 100, 2)))

    def observe(self, view: PassView, state: Any) -> None:
        """What the frames that become final look at."""
        state.setdefault("mass", {})[view.layer] = final_mass(view, self.window)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """Of rows, or of frames."""
        layout, grid = Layout.of(view), view.geometry.grid
        mass = layout.spread(state["mass"].pop(view.layer)).unflatten(2, grid)
        mass = max_pool2d(mass, self.pool, 1, self.pool // 2).flatten(2)
        mass = layout.at_rows(view, mass).unsqueeze(1)
        keys, there = normalize(layout.spread(wide(view.keys("raw"))), dim=-1), layout.there
        view.scored += sum(view.lengths)
        if self.unit == "frame":
            keys, there = keys.flatten(2).unsqueeze(2), there.any(-1, keepdim=True)
            keys = keys / view.geometry.tokens**0.5
            again = redundancy(keys, there, (1, 1), 0, self.alike)[..., 0]
            mass = view.by_frame(mass)
        else:
            again = layout.at_rows(view, redundancy(keys, there, grid, self.reach, self.alike))
        return self.weight * mass - (1 - self.weight) * again.unsqueeze(1)


def redundancy(x: Tensor, there: Tensor, grid: tuple[int, int], reach: int, alike: float) -> Tensor:
    """Softmax ``[H, F, T]`` of the mean cosine of unit keys ``[H, F, T, D]`` within reach."""
    heads, frames, tokens, _ = x.shape
    there, place = there.expand(heads, -1, -1), torch.arange(tokens, device=x.device)
    order = torch.arange(frames * tokens, device=x.device).view(frames, tokens)
    total, count = torch.zeros_like(x[..., 0]), 0
    latest, spared = order.expand(heads, -1, -1), total  # its most recent like, and their cosine
    for step in range((2 * reach + 1) ** 2):
        row = place // grid[1] + step // (2 * reach + 1) - reach
        column = place % grid[1] + step % (2 * reach + 1) - reach
        inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
        other = (row * grid[1] + column).clamp(0, tokens - 1)
        pair = there.unsqueeze(2) & there[:, :, other].unsqueeze(1) & inside
        same = order.unsqueeze(1) == order[:, other]
        near = torch.einsum("hitd,hjtd->hijt", x, x[:, :, other]) * (pair & ~same)
        total, count = total + near.sum(2), count + pair.sum(2)
        last, frame = torch.where(near > alike, order[:, other], -1).max(2)
        cosine = near.gather(2, frame.unsqueeze(2)).squeeze(2)
        spared = torch.where(last > latest, cosine, spared)
        latest = torch.maximum(last, latest)
    spared = summed(spared.flatten(1).unsqueeze(-1), latest.flatten(1), frames * tokens)
    mean = (total - spared.view_as(total)) / count.clamp_min(1)
    return mean.masked_fill(~there, -torch.inf).flatten(1).softmax(-1).view_as(total)
