"""What one forward pass of the model is for, and the fixed sizes of a rollout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_kv.cache.rotary import Rotary
from lightning_kv.cache.rows import ROW_BYTES

Phase = Literal["prefill", "denoise", "commit"]

CONDITIONAL = "cond"
"""The namespace whose passes come first; the only one without guidance."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that a cache and its policy need to know of the model.

    Args:
        layers: Number L of transformer blocks.
        heads: Number H of attention heads per block.
        head_dim: Width D of a head.
        grid: Token rows and columns of one latent frame.
        rotary: The model's rotary embedding.
        train_horizon: Longest rollout seen in training, in latent frames.
        element_size: Bytes of one number of a key or value.
        chunk: Frames that become final together; 0 where it is not known.
        flight: The most frames that one pass takes; 0 where it is not known.
        branches: Namespaces that a sample has a cache in: 2 under guidance.
        model: Name of the model whose head tables apply; nothing where it is not known. Models of
            the same sizes have equal geometries.
    """

    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    rotary: Rotary
    train_horizon: int
    element_size: int = 4
    chunk: int = 0
    flight: int = 0
    branches: int = 1
    model: str = field(default="", compare=False)

    @property
    def tokens(self) -> int:
        """Tokens per latent frame."""
        return self.grid[0] * self.grid[1]

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """Row and column of every token of a frame, int64 ``[tokens, 2]``."""
        raster = torch.arange(self.tokens, device=device)
        columns = self.grid[1]
        return torch.stack([raster.div(columns, rounding_mode="floor"), raster % columns], -1)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in all heads and layers as computed, each row's fields included."""
        row = 2 * self.head_dim * self.element_size + ROW_BYTES
        return row * self.heads * self.layers * self.tokens


@dataclass(frozen=True)
class Pass:
    """One forward pass, as the sampler asks for it: plain data.

    Args:
        phase: ``prefill`` (given latents), ``denoise``, or ``commit`` (clean latents at t = 0).
        frames: Ids of the latent frames in the query.
        timesteps: Noise level of each of these frames, 0 (clean) to 1000.
        chunk: Index of the chunk that becomes final next.
        step: Denoising step, from 0.
        final: Frames whose rows stay after this pass; none while denoising.
        opens: True in the first pass of a chunk.
        next_chunk: Number of frames of the next chunk; 0 after the last.
        namespace: Which cache it reads and writes (``cond``; ``uncond`` under guidance).
        times: Rotary time of each query frame; the frame id where not given.
        samples: Indices into the batch; every sample where not given.
        rebuild: True while a :class:`~lightning_kv.cache.decisions.Rebuild` is carried out.
        mode: ``run`` writes in place. ``scratch`` reads the cache and throws its own rows away;
            nothing is observed, counted or decided, and ``samples`` may name one sample several
            times. ``grad`` overwrites nothing: gradients reach queries, keys and values.
    """

    phase: Phase
    frames: tuple[int, ...]
    timesteps: tuple[float, ...]
    chunk: int
    step: int = 0
    final: tuple[int, ...] = ()
    opens: bool = False
    next_chunk: int = 0
    namespace: str = CONDITIONAL
    times: tuple[float, ...] | None = None
    samples: tuple[int, ...] | None = None
    rebuild: bool = False
    mode: Literal["run", "scratch", "grad"] = "run"

    @property
    def clean(self) -> bool:
        """Whether the latents are those that stay, at t = 0."""
        return self.phase != "denoise"

    def final_rows(self, tokens: int) -> slice:
        """Which of the rows in flight stay after this pass, given tokens per frame."""
        if not self.final:
            return slice(0, 0)
        low = self.frames.index(self.final[0])
        return slice(low * tokens, (low + len(self.final)) * tokens)

    @property
    def start(self) -> int:
        """First frame of the query."""
        return self.frames[0]

    @property
    def query_times(self) -> tuple[float, ...]:
        """Rotary time of each query frame."""
        return self.times if self.times is not None else tuple(map(float, self.frames))


def following(step: Pass) -> Pass:
    """The first pass after one that made frames final, as far as it is known."""
    last, count = step.final[-1], step.next_chunk or len(step.final)
    start = step.query_times[step.frames.index(last)] + 1
    frames = tuple(range(last + 1, last + 1 + count))
    times = tuple(start + i for i in range(count))
    return replace(step, frames=frames, timesteps=(0.0,) * count, times=times, final=())
