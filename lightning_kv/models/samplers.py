"""Samplers: generators of passes. Each yields ``(Pass, latents)`` and is sent the clean estimate.

Latents are ``[B, F, C, H, W]`` for the frames of the pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.passes import Pass

Noise = Callable[[int, int], Tensor]
"""``(chunk, step)`` to Gaussian noise for the frames of that chunk; step 0 is where it starts."""

Steps = Generator[tuple[Pass, Tensor], Tensor, None]


@dataclass(frozen=True)
class ChunkPlan:
    """Which frames are made together.

    Args:
        frames: All latent frames, the context included.
        chunk: Frames per chunk.
        context: Given frames at the start.

    Raises:
        ValueError: ``frames`` or ``context`` is no multiple of the chunk, or nothing is left.
    """

    frames: int
    chunk: int
    context: int = 0

    def __post_init__(self) -> None:
        for name, value in (("frames", self.frames), ("context", self.context)):
            if value % self.chunk:
                low = value // self.chunk * self.chunk
                raise ValueError(
                    f"{value} {name} are no multiple of the model's chunk of {self.chunk} frames. "
                    f"Use {low or self.chunk} or {low + self.chunk}."
                )
        if not 0 <= self.context < self.frames:
            raise ValueError(
                f"{self.frames} frames with {self.context} of context leave nothing to generate. "
                f"--frames includes the context: give at least {self.context + self.chunk}."
            )

    @property
    def count(self) -> int:
        """Number of chunks."""
        return self.frames // self.chunk

    def ids(self, index: int) -> tuple[int, ...]:
        """Frames of one chunk."""
        return tuple(range(index * self.chunk, (index + 1) * self.chunk))

    def after(self, index: int) -> int:
        """Frames of the chunk after this one."""
        return self.chunk if index + 1 < self.count else 0


def few_step(
    plan: ChunkPlan, timesteps: tuple[float, ...], noise: Noise, context: Tensor | None
) -> Steps:
    """Chunk by chunk in a few steps with fresh noise between them, then a commit pass at t = 0.

    Self Forcing (arXiv 2506.08009): ``x' = (1 - t') x0 + t' noise``, ``t`` over 1000. Given
    latents go through the model once at t = 0 first.

    Args:
        plan: The chunks.
        timesteps: Noise levels, 0 to 1000, falling.
        noise: Where noise comes from.
        context: Given clean latents ``[B, context, C, H, W]``.
    """
    for index in range(plan.count):
        frames, after = plan.ids(index), plan.after(index)
        if frames[-1] < plan.context:
            given = context[:, frames[0] : frames[-1] + 1]
            yield clean("prefill", frames, index, after, opens=True), given
            continue
        x = noise(index, 0)
        for step, t in enumerate(timesteps):
            level = (t,) * len(frames)
            x0 = yield (
                Pass("denoise", frames, level, index, step, opens=step == 0, next_chunk=after),
                x,
            )
            if step + 1 < len(timesteps):
                x = renoise(x0, noise(index, step + 1), timesteps[step + 1])
        yield clean("commit", frames, index, after), x0


def clean(phase: str, frames: tuple[int, ...], chunk: int, after: int, opens: bool = False) -> Pass:
    """A pass at t = 0 that makes its frames final."""
    still = (0.0,) * len(frames)
    return Pass(phase, frames, still, chunk, final=frames, opens=opens, next_chunk=after)


def renoise(x0: Tensor, noise: Tensor, timestep: float) -> Tensor:
    """``(1 - s) x0 + s noise`` with ``s = timestep / 1000``."""
    sigma = timestep / 1000
    return (1 - sigma) * x0 + sigma * noise


def warp(steps: tuple[float, ...], shift: float) -> tuple[float, ...]:
    """Timesteps on a shifted schedule: ``1000 * shift u / (1 + (shift - 1) u)``, ``u = t / 1000``.

    >>> warp((1000, 750, 500, 250), 5.0)
    (1000.0, 937.5, 833.3333333333334, 625.0)
    """
    return tuple(1000 * shift * (t / 1000) / (1 + (shift - 1) * t / 1000) for t in steps)


def keyed_noise(seed: int, keys: list[str], plan: ChunkPlan, shape: tuple[int, int, int]) -> Noise:
    """Noise that depends on (seed, prompt key, chunk, step) alone, drawn on the CPU.

    So a prompt gets the same noise alone, in a batch, on any device and in any order.

    Args:
        seed: Of the run.
        keys: Prompt key of each sample.
        plan: The chunks.
        shape: Channels, height and width of a latent frame.
    """

    def draw(chunk: int, step: int) -> Tensor:
        size = (plan.chunk, *shape)
        rows = []
        for key in keys:
            rng = torch.Generator().manual_seed(stable_seed(seed, key, chunk, step))
            rows.append(torch.randn(size, generator=rng))
        return torch.stack(rows)

    return draw


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
