"""What a whole table of budgets costs in one chunk, with the history as the reference made it.

Shapes: L layers, H heads, T query tokens, F held frames, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import Pass
from lightning_kv.calibration.frames import attention_over, check_frames, kept_at, order_of
from lightning_kv.calibration.passes import frame_mass
from lightning_kv.calibration.scorers import Scorer
from lightning_kv.models.samplers import Noise, renoise
from lightning_kv.rollout import Call

Table = Sequence[Sequence[int]]
"""Frames of history that each head reads, ``[L][H]``."""


class _Budgeted:
    """Stands in for the session: every head reads as many frames as a table says."""

    def __init__(self, session: Any, table: Table, scorer: Scorer, sink: int) -> None:
        self.session, self.table, self.scorer, self.sink = session, table, scorer, sink

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """Attention to the frames that come first in each head's own order."""
        view = self.session.view(layer, q, k, v, step)
        check_frames(view)
        order = order_of(self.scorer(view, frame_mass(view)), view.frames, self.sink)
        budget = torch.tensor(self.table[layer], device=order.device)
        return attention_over(view, kept_at(order, budget)).unsqueeze(0).to(q)


def chunk_losses(
    call: Call, noise: Noise, tables: Mapping[str, Table], scorer: Scorer, sink: int = 0
) -> dict[str, float]:
    """Relative error of a chunk's final latents under tables of budgets.

    All denoising steps of the chunk run under each table, from the same noise and the same
    history; with all frames read the error is 0.

    Args:
        call: The first pass of a chunk, of one clip, from ``rollout(..., before=...)``; of a
            model with a few-step sampler.
        noise: The rollout's.
        tables: By name.
        scorer: The order in which heads read frames.
        sink: First frames that are read before all others.

    Raises:
        ValueError: It is no first pass, of several clips, or of another sampler.
    """
    config, step = call.network.config, call.step
    if config.sampler != "few-step" or step.step or step.phase != "denoise" or len(call.x) != 1:
        raise ValueError(
            f"Chunks are judged from their first denoising pass, one clip at a time, under the "
            f"few-step sampler; this is a {step.phase} pass, step {step.step}, of {len(call.x)} "
            f"clips under the sampler {config.sampler}. Calibrate and prove with such a model."
        )
    dense = _final(call, noise, call.session)
    norm = dense.square().sum()
    found = {}
    for name, table in tables.items():
        own = _final(call, noise, _Budgeted(call.session, table, scorer, sink))
        found[name] = float((own - dense).square().sum() / norm)
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
