"""Samplers: generators of passes. Each yields ``(Pass, latents)`` and is sent the clean estimate.

Latents are ``[B, F, C, H, W]`` for the frames of the pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_kv.cache.passes import Pass
from lightning_kv.models.unipc import UniPC

Noise = Callable[[int, int], Tensor]
"""``(chunk, step)`` to Gaussian noise for the frames of that chunk; step 0 is where it starts."""

Steps = Generator[tuple[Pass, Tensor], Tensor, None]

Sampler = Callable[["ChunkPlan", tuple[float, ...], Noise, "Tensor | None"], Steps]
"""``(plan, timesteps, noise, given latents)`` to passes."""


class Conventions(Protocol):
    """What a checkpoint says about sampling; see :class:`~lightning_kv.models.wan.WanConfig`."""

    sampler: str
    first_timesteps: tuple[float, ...]
    shift: float
    guidance: float


@dataclass(frozen=True)
class ChunkPlan:
    """Which frames are made together.

    Args:
        frames: All latent frames, the context included.
        chunk: Frames per chunk.
        context: Given frames at the start.
        short_last: The last chunk may have fewer frames.

    Raises:
        ValueError: ``frames`` or ``context`` is no multiple of the chunk, or nothing is left.
    """

    frames: int
    chunk: int
    context: int = 0
    short_last: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.context < self.frames:
            raise ValueError(
                f"{self.frames} frames with {self.context} of context leave nothing to generate. "
                f"--frames includes the context: give at least {self.context + self.chunk}."
            )
        whole = {"context": self.context} | ({} if self.short_last else {"frames": self.frames})
        for name, value in whole.items():
            if value % self.chunk:
                low = value // self.chunk * self.chunk
                raise ValueError(
                    f"{value} {name} are no multiple of the model's chunk of {self.chunk} frames. "
                    f"Use {low or self.chunk} or {low + self.chunk}."
                )

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.frames // self.chunk)

    @property
    def given(self) -> int:
        """Number of chunks that are given."""
        return self.context // self.chunk

    def ids(self, index: int) -> tuple[int, ...]:
        """Frames of one chunk."""
        return tuple(range(index * self.chunk, min((index + 1) * self.chunk, self.frames)))

    def after(self, index: int) -> int:
        """Frames of the chunk after this one."""
        return len(self.ids(index + 1))


def sampler_of(conventions: Conventions) -> Sampler:
    """The sampler that a checkpoint was made for."""
    known: dict[str, Sampler] = {
        "few-step": partial(few_step, first=conventions.first_timesteps, shift=conventions.shift),
        "rolling": partial(rolling, shift=conventions.shift),
        "flow": partial(flow, guidance=conventions.guidance),
    }
    return known[conventions.sampler]


def few_step(
    plan: ChunkPlan,
    timesteps: tuple[float, ...],
    noise: Noise,
    context: Tensor | None,
    first: tuple[float, ...] = (),
    shift: float = 0.0,
) -> Steps:
    """Chunk by chunk in a few steps with fresh noise between them, then a commit pass at t = 0.

    Self Forcing (arXiv 2506.08009) and CausVid (arXiv 2412.07772): ``x' = (1 - t') x0 + t' noise``,
    ``t`` over 1000. Given latents go through the model once at t = 0 first. With chunks of one
    frame it is the frame-wise sampler of Causal Forcing.

    Args:
        plan: The chunks.
        timesteps: Noise levels, 0 to 1000, falling.
        noise: Where noise comes from.
        context: Given clean latents ``[B, context, C, H, W]``.
        first: Noise levels of the very first chunk where they differ (Causal Forcing++).
        shift: See :func:`sigma_of`.
    """
    yield from prefill(plan, context)
    for index in range(plan.given, plan.count):
        frames, after = plan.ids(index), plan.after(index)
        levels = first if first and index == 0 else timesteps
        x = noise(index, 0)
        for step, t in enumerate(levels):
            same = (t,) * len(frames)
            here = Pass("denoise", frames, same, index, step, opens=step == 0, next_chunk=after)
            x0 = (yield here, x).to(x.dtype)
            if step + 1 < len(levels):
                x = renoise(x0, noise(index, step + 1), levels[step + 1], shift)
        yield clean("commit", frames, index, after), x0


def rolling(
    plan: ChunkPlan,
    timesteps: tuple[float, ...],
    noise: Noise,
    context: Tensor | None,
    shift: float = 0.0,
) -> Steps:
    """As many chunks in flight as there are noise levels, each one level below the next.

    Rolling Forcing (arXiv 2509.25161): every pass takes all chunks in flight one level down; the
    oldest comes out clean, goes through the model alone at t = 0, and a chunk of pure noise enters
    at the other end. At both ends of the video fewer chunks are in flight.

    Args:
        plan: The chunks.
        timesteps: Noise levels, 0 to 1000, falling.
        noise: Where noise comes from.
        context: Given clean latents ``[B, context, C, H, W]``.
        shift: See :func:`sigma_of`.
    """
    yield from prefill(plan, context)
    depth, flight = len(timesteps), {}
    for turn in range(plan.given, plan.count + depth - 1):
        oldest = max(plan.given, turn - depth + 1)
        if turn < plan.count:
            flight[turn] = noise(turn, 0)
        level = {index: turn - index for index in flight}
        frames = tuple(f for index in flight for f in plan.ids(index))
        levels = tuple(timesteps[level[i]] for i in flight for _ in plan.ids(i))
        # a chunk opens once: with the first pass in which it is the next to become final
        opens = turn == plan.given or turn >= plan.given + depth
        after = plan.after(oldest)
        step = Pass("denoise", frames, levels, oldest, level[oldest], (), opens, after)
        x = torch.cat([*flight.values()], dim=1)
        x0 = (yield step, x).to(x.dtype)
        parts = x0.split([len(plan.ids(index)) for index in flight], dim=1)
        for index, part in zip(list(flight), parts, strict=True):
            if level[index] == depth - 1:
                yield clean("commit", plan.ids(index), index, after), part
                del flight[index]
            else:
                below = level[index] + 1
                flight[index] = renoise(part, noise(index, below), timesteps[below], shift)


def flow(
    plan: ChunkPlan,
    timesteps: tuple[float, ...],
    noise: Noise,
    context: Tensor | None,
    guidance: float = 3.0,
) -> Steps:
    """Many steps of an ODE solver per chunk, with guidance: for models before distillation.

    Flow matching (arXiv 2210.02747) solved by UniPC (arXiv 2302.04867), with classifier-free
    guidance (arXiv 2207.12598). Each branch has its own cache: the namespaces ``cond`` and
    ``uncond``.

    Args:
        plan: The chunks.
        timesteps: Noise levels, 0 to 1000, falling.
        noise: Where noise comes from; only the first of each chunk is drawn.
        context: Given clean latents ``[B, context, C, H, W]``.
        guidance: Scale; 1 leaves the ``uncond`` branch out.
    """
    guided = partial(_guided, guidance=guidance)
    for step, x in prefill(plan, context):
        yield from guided(step, x)
    for index in range(plan.given, plan.count):
        frames, after = plan.ids(index), plan.after(index)
        x, solver = noise(index, 0), UniPC([t / 1000 for t in timesteps])
        dtype, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
        for step, t in enumerate(timesteps):
            same = (t,) * len(frames)
            here = Pass("denoise", frames, same, index, step, opens=step == 0, next_chunk=after)
            x0 = yield from guided(here, x.to(dtype))
            x = solver.step(x0.to(work), x.to(work))
        yield from guided(clean("commit", frames, index, after), x.to(dtype))


def _guided(
    step: Pass, x: Tensor, guidance: float
) -> Generator[tuple[Pass, Tensor], Tensor, Tensor]:
    """One pass in each branch; their estimates differ as their velocities do, so they combine."""
    cond = yield step, x
    if guidance == 1:
        return cond
    uncond = yield replace(step, namespace="uncond"), x
    return uncond + guidance * (cond - uncond)


def prefill(plan: ChunkPlan, context: Tensor | None) -> Steps:
    """Given latents through the model once, chunk by chunk, at t = 0."""
    for index in range(plan.given):
        frames = plan.ids(index)
        given = context[:, frames[0] : frames[-1] + 1]
        yield clean("prefill", frames, index, plan.after(index), opens=True), given


def clean(phase: str, frames: tuple[int, ...], chunk: int, after: int, opens: bool = False) -> Pass:
    """A pass at t = 0 that makes its frames final."""
    still = (0.0,) * len(frames)
    return Pass(phase, frames, still, chunk, final=frames, opens=opens, next_chunk=after)


def sigma_of(timesteps: Tensor, shift: float = 0.0) -> Tensor:
    """Share of noise at timesteps, float64.

    The networks see timesteps of 0 to 1000. Where a list of them is published rounded (757, 522),
    the share of noise is that of the nearest of 1,000 entries of the shifted schedule; 0 means
    clean.

    Args:
        timesteps: Any shape.
        shift: Of that schedule; 0 for exact timesteps, which are 1000 times the share.
    """
    exact = timesteps.double() / 1000
    if not shift:
        return exact
    table = torch.linspace(1, 0, 1001, dtype=torch.float64, device=timesteps.device)[:-1]
    table = shift * table / (1 + (shift - 1) * table)
    nearest = table[(exact.unsqueeze(-1) - table).abs().argmin(-1)]
    return torch.where(timesteps == 0, exact, nearest)


def renoise(x0: Tensor, noise: Tensor, timestep: float, shift: float = 0.0) -> Tensor:
    """``(1 - s) x0 + s noise``, see :func:`sigma_of`; the sum is formed in float32 at least.

    The result has the dtype of ``x0``.
    """
    sigma = float(sigma_of(torch.tensor(float(timestep), dtype=torch.float64), shift))
    work = torch.promote_types(x0.dtype, torch.float32)
    return ((1 - sigma) * x0.to(work) + sigma * noise.to(work)).to(x0.dtype)


def warp(steps: tuple[float, ...], shift: float) -> tuple[float, ...]:
    """Timesteps on a shifted schedule: ``1000 * shift u / (1 + (shift - 1) u)``, ``u = t / 1000``.

    >>> warp((1000, 750, 500, 250), 5.0)
    (1000.0, 937.5, 833.3333333333334, 625.0)
    """
    return tuple(1000 * shift * (t / 1000) / (1 + (shift - 1) * t / 1000) for t in steps)


def spaced(steps: int, shift: float) -> tuple[float, ...]:
    """Noise levels of a many-step sampler: evenly spaced from 999 down, then shifted (Wan2.1).

    >>> [round(t, 1) for t in spaced(4, 5.0)]
    [999.8, 937.3, 833.1, 624.7]
    """
    return warp(tuple(999 * (1 - i / steps) for i in range(steps)), shift)


NOISE_REVISION = 2
"""Changes with every change of what :func:`keyed_noise` draws; stands in every record.

1 was torch's generator, which looked at 32 bits of its seed.
"""


def keyed_noise(seed: int, keys: list[str], plan: ChunkPlan, shape: tuple[int, int, int]) -> Noise:
    """Noise that depends on (seed, prompt key, chunk, step) alone, drawn on the CPU.

    So a prompt gets the same noise alone, in a batch, on any rank and device and in any order; and
    a longer rollout begins like a shorter one. Philox (Salmon et al., SC 2011) takes 128 bits of
    key, all of which count: two blocks of noise are never the same by chance.

    Args:
        seed: Of the run.
        keys: Prompt key of each sample.
        plan: The chunks.
        shape: Channels, height and width of a latent frame.
    """

    def draw(chunk: int, step: int) -> Tensor:
        rows = []
        for key in keys:
            rng = np.random.Generator(np.random.Philox(key=digest(seed, key, chunk, step) >> 128))
            rows.append(rng.standard_normal((plan.chunk, *shape), dtype=np.float32))
        return torch.from_numpy(np.stack(rows))[:, : len(plan.ids(chunk))]

    return draw


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine and in every process."""
    return digest(*parts) >> 193


def digest(*parts: object) -> int:
    """The SHA-256 of any values as a number of 256 bits."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
