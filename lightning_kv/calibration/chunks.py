"""What a way to read costs in one chunk, with the history as the reference made it.

Shapes: H heads, Q query frames, T query tokens, F held frames, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import Pass
from lightning_kv.cache.view import PassView
from lightning_kv.calibration.frames import attention_over, check_frames
from lightning_kv.models.samplers import Noise, renoise
from lightning_kv.policies.base import SelectPart
from lightning_kv.rollout import Call


class _Reading:
    """Stands in for the session: a select part chooses what is read of all that is held."""

    def __init__(self, session: Any, part: SelectPart) -> None:
        self.session, self.part, self.state = session, part, part.fresh()
        if part.budget is not None:
            self.state["budget"] = part.budget.fresh()
        self.kept: dict[int, Tensor | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """Attention to the frames that each head reads."""
        view = self.session.view(layer, q, k, v, step)
        check_frames(view)
        if layer not in self.kept or self.part.refresh == "pass":
            self.kept[layer] = self._frames(view)
        kept = self.kept[layer]
        if kept is None:
            return self.session.attend(layer, q, k, v, step)
        return attention_over(view, kept).unsqueeze(0).to(q)

    def _frames(self, view: PassView) -> Tensor | None:
        """What is read, bool ``[H, F]``; None for everything."""
        found = self.part.pick(view, self.state)
        if found is None:
            return None
        frames = found.frames
        if isinstance(frames, tuple):
            frames = torch.tensor([own in frames for own in view.frames], device=view.device)
            frames = frames.view(1, 1, -1)
        if frames is None or frames.shape[1] > 1 or found.bias is not None:
            raise ValueError(
                f"The select part {self.part.name!r} reads single rows, reads by query frame, or "
                "adds a bias, and chunks are judged by whole frames. Use a part that chooses "
                "frames for all queries, such as top-attention."
            )
        return frames[:, 0].expand(view.heads, -1)


def chunk_losses(call: Call, noise: Noise, parts: Mapping[str, SelectPart]) -> dict[str, float]:
    """Relative error of a chunk's final latents when less of the history is read.

    All denoising steps of the chunk run with each part, from the same noise and over the same
    history, which the reference made. The error is the norm of the change over that of the
    latents.

    Args:
        call: The first pass of a chunk, of one clip, from ``rollout(..., before=...)``; of a
            model with a few-step sampler.
        noise: The rollout's.
        parts: What chooses, by name.

    Raises:
        ValueError: It is no first pass, of several clips, or of another sampler; or a part does
            not choose whole frames.
    """
    config, step = call.network.config, call.step
    if config.sampler != "few-step" or step.step or step.phase != "denoise" or len(call.x) != 1:
        raise ValueError(
            f"Chunks are judged from their first denoising pass, one clip at a time, under the "
            f"few-step sampler; this is a {step.phase} pass, step {step.step}, of {len(call.x)} "
            f"clips under the sampler {config.sampler}. Calibrate and prove with such a model."
        )
    dense, found = _final(call, noise, call.session), {}
    for name, part in parts.items():
        change = _final(call, noise, _Reading(call.session, part)) - dense
        found[name] = float(change.norm() / dense.norm())
    return found


def _final(call: Call, noise: Noise, session: Any) -> Tensor:
    """The chunk's last clean estimate, float64."""
    config, x = call.network.config, call.x
    levels = config.first_timesteps if config.first_timesteps and not call.step.chunk else None
    levels = levels or config.timesteps
    for index, t in enumerate(levels):
        step = replace(call.step, mode="scratch", opens=False, step=index)
        step = replace(step, timesteps=(t,) * len(step.frames))
        level = torch.full_like(call.timesteps, t)
        out = call.network(x, level, call.text, session, step)
        x0 = call.network.x0(out, x, level)
        if index + 1 < len(levels):
            fresh = noise(call.step.chunk, index + 1).to(call.x)
            x = renoise(x0.to(call.x.dtype), fresh, levels[index + 1], config.shift)
    return x0.double()
