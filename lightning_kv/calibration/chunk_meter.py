"""One clip after the other: the reference is rolled out, and chunks of it are made again.

Each is made once for every way to read less, and its relative error is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_kv.cache.passes import CONDITIONAL
from lightning_kv.calibration.chunks import chunk_losses
from lightning_kv.calibration.clips import ClipMeter
from lightning_kv.calibration.memory import Held
from lightning_kv.models.samplers import Noise, keyed_noise
from lightning_kv.policies.base import SelectPart
from lightning_kv.rollout import Call, Rollout


@dataclass
class ChunkRecorder:
    """Makes chunks of one clip again: ``rollout(..., before=ChunkRecorder(...))``.

    Args:
        key: Of the clip.
        chunks: Which.
        steps: Denoising steps of the sampler.
        ways: What chooses the frames that are read, by name.

    Attributes:
        noise: The rollout's; set before it starts.
        records: By chunk and its first step: relative error of each way, float64 on the CPU.
    """

    key: str
    chunks: Sequence[int]
    steps: int
    ways: Mapping[str, SelectPart]
    noise: Noise | None = None
    records: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, call: Call) -> None:
        """Measure, if this is the first pass of such a chunk.

        Raises:
            ValueError: An error is not finite; or as
                :func:`~lightning_kv.calibration.chunks.chunk_losses`.
        """
        step = call.step
        if step.chunk not in self.chunks or step.step or step.namespace != CONDITIONAL:
            return
        if step.phase == "denoise":
            losses = chunk_losses(call, self.noise, self.ways)
            found = {name: torch.tensor(own, dtype=torch.float64) for name, own in losses.items()}
            if wrong := [name for name, own in found.items() if not own.isfinite()]:
                raise ValueError(
                    f"Errors of clip {self.key!r} in chunk {step.chunk} are not finite under "
                    f"{', '.join(wrong)}. The model gives no usable numbers here: try --precision "
                    "reference, and look at the clip."
                )
            self.records[step.chunk, step.step] = found


@dataclass(frozen=True, eq=False)
class ChunkMeter(ClipMeter):
    """Measures clips, one at a time, by their chunks instead of by their heads.

    Args:
        ways: What chooses the frames that are read, by name.
    """

    ways: Mapping[str, SelectPart] = field(default_factory=dict)

    def _site(
        self,
        key: str,
        chunks: tuple[int, ...],
        validates: bool,
        memories: Mapping[str, Held],
    ) -> ChunkRecorder:
        steps = len(self.model.network.config.timesteps)
        return ChunkRecorder(key, chunks, steps, self.ways)

    def _roll(
        self,
        key: str,
        prompt: str,
        frames: int,
        context: Tensor | None,
        site: ChunkRecorder,
        share: float,
        progress: Callable[[float], None] | None,
        profiles: bool,
    ) -> Rollout:
        config, given = self.model.network.config, 0 if context is None else len(context)
        shape = (config.channels, *(self.latent_size or config.latent_size))
        site.noise = keyed_noise(self.seed, [key], config.plan(frames, given), shape)
        return super()._roll(key, prompt, frames, context, site, share, progress, profiles)
