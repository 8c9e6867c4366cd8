"""Clocks and counts of one rollout, from marks that its sampler sets at both ends of a pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import Pass
from lightning_kv.models.samplers import Sampler, Steps
from lightning_kv.models.wan import WanConfig


@dataclass(frozen=True)
class Work:
    """What the passes of a chunk attend to.

    Args:
        queries: Tokens of all passes.
        own: Queries times the tokens of the same pass.
        read: Queries times the rows of the history that they read, in all layers and heads.
        history: The same if they had read all of it.
    """

    queries: int
    own: int
    read: int
    history: int

    def flops(self, config: WanConfig, rows: int) -> int:
        """Of linear layers and attention, with so many rows of the history.

        The text's keys and values are made once per prompt, and embeddings are small: neither
        counts.
        """
        linear = 2 * self.queries * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
        attention = 4 * config.dim * (self.own + self.queries * config.text_len)
        return config.layers * (linear + attention) + 4 * config.dim // config.heads * rows


@dataclass
class Run:
    """One rollout: times by pass, and what was held.

    A pass lasts from when the sampler is asked for it until the session has closed it, so the
    noise before it counts for it.

    Args:
        device: Where the network is.
        session: Whose cache it is; asked for its frames when a chunk opens, off the clock.
        denoise: Seconds of each chunk.
        commit: Seconds of each chunk.
        frames: History frames of each chunk.
        allocated: Bytes at the end of each chunk; none on a CPU.
        held: Bytes of the cache while each chunk is denoised.
        peaks: Most bytes, see :func:`peaks`.
        latents: What was made; None where memory ran out.
        failure: What torch said when memory ran out.
        work: What the passes of each chunk had to attend to.
    """

    device: torch.device
    session: Any
    denoise: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    frames: list[float] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    peaks: dict[str, int | None] = field(default_factory=dict)
    latents: Tensor | None = None
    failure: str = ""
    work: list[Work] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of each chunk."""
        return [a + b for a, b in zip(self.denoise, self.commit, strict=True)]

    def timed(self, sampler: Sampler) -> Sampler:
        """The same sampler with a mark at both ends of every pass."""

        def passes(*given: Any) -> Steps:
            steps, estimate, laps, sizes = sampler(*given), None, [], []
            while True:
                began = self._mark()
                try:
                    step, x = steps.send(estimate)
                except StopIteration:
                    return
                estimate = yield step, x
                laps.append((step.phase, began, self._mark()))
                sizes.append(len(step.frames) * self.session.geometry.tokens)
                if step.opens:
                    self.frames.append(self.session.held_frames())
                if step.phase == "commit":
                    self._close(laps)
                    self.work.append(self._work(sizes))
                    laps, sizes = [], []

        return passes

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _work(self, sizes: list[int]) -> Work:
        """Of a chunk; the session counts its rows since the rollout began."""
        cost, before = self.session.costs[0], self.work
        return Work(
            queries=sum(sizes),
            own=sum(size**2 for size in sizes),
            read=cost.rows_read - sum(chunk.read for chunk in before),
            history=cost.rows_history - sum(chunk.history for chunk in before),
        )

    def _close(self, laps: list[tuple[str, Any, Any]]) -> None:
        """Wait for the device and read the marks of a chunk."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            self.allocated.append(torch.cuda.memory_allocated(self.device))
        for phase, seconds in (("denoise", self.denoise), ("commit", self.commit)):
            own = [(began, ended) for name, began, ended in laps if name == phase]
            seconds.append(sum(a.elapsed_time(b) / 1000 if cuda else b - a for a, b in own))


def looked_at(
    sampler: Sampler, before: Callable[[Pass], None], after: Callable[[Pass], None]
) -> Sampler:
    """The same sampler; both are told of a pass, when it is asked for and when it is closed."""

    def passes(*given: Any) -> Steps:
        steps, estimate = sampler(*given), None
        while True:
            try:
                step, x = steps.send(estimate)
            except StopIteration:
                return
            before(step)
            estimate = yield step, x
            after(step)

    return passes
