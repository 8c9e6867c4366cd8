"""In which order passes come: chunk by chunk, several chunks in flight, with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_kv.cache.passes import CONDITIONAL, Pass
from lightning_kv.models.samplers import ChunkPlan
from lightning_kv.models.samplers import rolling as rolling_sampler


def chunked(sizes: Sequence[int], noisy: int = 2, context: int = 0) -> list[Pass]:
    """Chunk by chunk: some denoising passes, then a commit pass; of given chunks a prefill.

    Args:
        sizes: Frames of each chunk.
        noisy: Denoising passes.
        context: Chunks that are given.
    """
    found, start = [], 0
    for chunk, (size, after) in enumerate(zip(sizes, (*sizes[1:], 0), strict=True)):
        frames, given = tuple(range(start, start + size)), chunk < context
        for step in range(0 if given else noisy):
            level = (1000.0 * (1 - step / noisy),) * size
            found.append(Pass("denoise", frames, level, chunk, step, (), step == 0, after))
        phase, opens = ("prefill", True) if given else ("commit", not noisy)
        found.append(Pass(phase, frames, (0.0,) * size, chunk, 0, frames, opens, after))
        start += size
    return found


def rolling(chunk: int, frames: int, flight: int) -> list[Pass]:
    """Several chunks in flight at falling noise levels, as the rolling sampler runs them."""
    plan = ChunkPlan(frames, chunk, short_last=True)
    levels = tuple(1000.0 * (1 - i / flight) for i in range(flight))

    def nothing(index: int, step: int) -> Tensor:
        return torch.zeros(1, len(plan.ids(index)), 1, 1, 1)

    steps = rolling_sampler(plan, levels, nothing, None)
    found, sent = [], None
    while True:
        try:
            step, sent = steps.send(sent)
        except StopIteration:
            return found
        found.append(step)


def without_commits(steps: Sequence[Pass]) -> list[Pass]:
    """The same of a sampler without commit passes: the last denoising pass makes frames final."""
    found: list[Pass] = []
    for step in steps:
        if step.phase == "commit" and found and step.frames[0] == found[-1].start:
            found[-1] = replace(found[-1], final=step.final)
        else:
            found.append(step)
    return found


def guided(steps: Sequence[Pass]) -> list[Pass]:
    """The same under guidance: every pass in the prompt's namespace, then in the other one."""
    return [replace(step, namespace=name) for step in steps for name in (CONDITIONAL, "uncond")]


# -- tapes -----------------------------------------------------------------------------------
