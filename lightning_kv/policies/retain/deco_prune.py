"""Keep the tokens that the model could not foresee."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart, newest
from lightning_kv.policies.checks import between, check_shown, portion, step_of
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import by_token

WHOLE = 2.0**100  # error of tokens that are kept whatever happens


@dataclass(frozen=True)
class DecoPrune(RetainPart):
    """Keep the tokens that the model could not foresee.

    DeCoPrune (CMBench, no arXiv id). A token's error is the mean squared difference, over its patch
    of the latents, between the final latents and the clean estimate at an intermediate denoising
    step. Small ones are dropped from all layers and heads, two chunks later, before the commit pass
    attends; the first chunk and what has no estimate stay whole. Given frames get theirs from a
    pass that is thrown away (its reads are not counted).

    Ours: also where no frames are given. With a budget, the largest errors fill it beside the
    newest chunk at each commit, in place of the threshold. Chunks in flight together are judged at
    their own steps, guided branches by their own estimates.

    Args:
        gamma: Largest error, in squared latents, of a token that is dropped.
        probe: The denoising step whose estimate counts, from 0; below 1 a share of the steps, and
            before the last, whose estimate is what becomes final.
        local: Whole chunks that the next one reads, beside the newest.
    """

    name: ClassVar[str] = "deco-prune"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "deco-prune",
            "Drop tokens that an earlier denoising step foresaw, alike in all layers and heads.",
            "CMBench, no arXiv id",
            ("memory", "reads"),
            {"retain": "deco-prune", "positions": "virtual-age"},
            "no budget: gamma 0.1 at the third of four steps; chunks of 4, the 2 newest whole",
        ),
    )
    moments: ClassVar[tuple[str, ...]] = ("commit", "closing")
    columns: ClassVar[dict[str, str]] = {"error": "max"}
    gamma: float = 0.1
    probe: float = 0.5
    local: int = 1

    def __post_init__(self) -> None:
        between(self, 0, None, "gamma")
        portion(self, "probe", unit="steps", whole="the denoising steps")
        between(self, 1, None, "local")

    unit: ClassVar[str] = "token"

    def smallest(self, chunk: int) -> int:
        """The newest chunk."""
        return max(chunk, 1)

    def probed(self, steps: int) -> int:
        """Index of the denoising step whose estimate counts."""
        return step_of(self, "probe", steps)

    def on_prediction(self, step: Pass, timestep: float, x0: Tensor, state: Any) -> None:
        """Estimates of the frames in flight, step by step; of given ones the only one."""
        for frame, own in zip(step.frames, x0, strict=True):
            state.setdefault("seen", {}).setdefault(frame, []).append(own.clone())
        state["given"] = step.mode == "scratch"

    def on_final(self, x0: Tensor, state: Any) -> None:
        """How far the estimate was from the frames that have become final, ``[F, h, w]``."""
        starts = state.setdefault("starts", [0])
        seen = [state.get("seen", {}).pop(starts[-1] + i, None) for i in range(len(x0))]
        state["off"] = None
        if None not in seen:
            at = [0 if state["given"] else self.probed(len(own)) for own in seen]
            guess = torch.stack([own[i] for own, i in zip(seen, at, strict=True)])
            if len(starts) > 1:
                state["off"] = (guess.float() - x0.float()).square().mean(1)
        starts.append(starts[-1] + len(x0))

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Note the errors of the new rows; with a budget, keep the largest."""
        check_shown(self, views[0], "starts" in state, state.get("off"))
        state["error"] = {view.layer: self.errors(view, state) for view in views}
        pairs = zip(views, self.choose(views, state), strict=True)
        made = state.pop("error")
        return [
            Retention({"error": made[v.layer]}, keep=u if u is None else u[:, 0]) for v, u in pairs
        ]

    def errors(self, view: CacheView, state: Any) -> Tensor:
        """Of all rows, ``[1 or H, N]``."""
        new, old, off = view.frame_id >= newest(view), view.field("error"), state.get("off")
        if off is None:
            return torch.where(new, WHOLE, old)
        off = by_token(off, view.geometry.grid).nan_to_num(WHOLE, WHOLE).flatten()
        at = (view.frame_id - newest(view)) * view.geometry.tokens + view.raster
        return torch.where(new, off[at.clamp(0, len(off) - 1)], old)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """The errors."""
        return state["error"][view.layer].unsqueeze(1)

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The newest chunk."""
        return (view.frame_id >= newest(view)).unsqueeze(1)

    def closing(self, view: CacheView, state: Any) -> Retention | None:
        """Drop what was foreseen in the chunks that are old enough."""
        starts, old = state.get("starts", [0]), view.step.chunk + 1 - 2 * self.local
        if self.budget is not None or not 1 < old < len(starts):
            return None
        return Retention(keep=(view.frame_id >= starts[old]) | (view.field("error") > self.gamma))
