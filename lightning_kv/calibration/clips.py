"""One clip after the other: the reference is rolled out, and heads are judged at its sites.

Shapes: L layers, H heads, N budgets of the grid, F latent frames of a clip, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import CONDITIONAL
from lightning_kv.calibration.memory import Held, Memory
from lightning_kv.calibration.sites import SiteRecorder, SiteSettings, sites_of
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.profiles import Profile
from lightning_kv.rollout import Rollout, rollout

TABLES = ("mass", "lags")
"""What profiles of heads are made of, see :mod:`lightning_kv.cache.record`."""


@dataclass(frozen=True, eq=False)
class ClipRecord:
    """What was measured in one clip.

    Args:
        key: Of prompt and noise.
        unit: Key of the prompt, which statistics count.
        sites: By chunk and step, as :class:`~lightning_kv.calibration.sites.SiteRecorder` has them.
        profile: ``mass`` ``[chunks, L, H, frames]`` of the first chunks, whose whole history is
            within reach, and ``logits`` ``[L, H, reach + 1]`` by lag; nothing where it was not
            recorded.
    """

    key: str
    unit: str
    sites: Mapping[tuple[int, int], Mapping[str, Tensor]]
    profile: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def validates(self) -> bool:
        """Whether losses were also measured exactly."""
        return all("zero" in record for record in self.sites.values())


@dataclass(frozen=True, eq=False)
class ClipMeter:
    """Measures clips, one at a time: a record depends on these settings and the clip alone.

    Args:
        model: Any whose sampler makes one chunk at a time.
        reference: Policy that holds as many whole frames as are within reach, or more, alike in all
            heads; all where a scorer is a memory.
        settings: What is measured.
        frames: Latent frames of a clip, what is given included.
        seed: Of the noise.
        latent_size: Latent height and width; the model's own where None.
        negative: What guidance leads away from.
        backend: Attention kernel.
        profiles: Also record what heads attend to, for labels.
    """

    model: VideoModel
    reference: CachePolicy
    settings: SiteSettings
    frames: int
    seed: int = 0
    latent_size: tuple[int, int] | None = None
    negative: str = ""
    backend: str = "sdpa"
    profiles: bool = False

    def of_prompt(
        self,
        key: str,
        unit: str,
        prompt: str,
        context: Tensor | None = None,
        validates: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> ClipRecord:
        """A clip that the model makes of a prompt; the history at a site is its own.

        Args:
            key: Of prompt and noise.
            unit: Of the prompt.
            prompt: What the model is told.
            context: Given latents ``[frames, C, h, w]`` at the start.
            validates: Losses are measured exactly too.
            progress: Told after every chunk by how much of the clip it is further.

        Raises:
            ValueError: The clip is too short, or a site cannot be measured.
        """
        given, chunk = 0 if context is None else len(context), self.model.network.config.chunk
        chunks = sites_of(key, self.frames, chunk, self.settings, given)
        count, memories = self.model.network.config.plan(self.frames, given).count, {}
        share = 1 / count
        if self.memories:  # of the whole clip, which has to be made for that
            share = 1 / (2 * count + self._looked_up)
            out = self._roll(key, prompt, self.frames, context, None, share, progress, False)
            memories = self._held(chunks, key, prompt, out.latents[0], share, progress)
        site = self._site(key, chunks, validates, memories)
        out = self._roll(key, prompt, self.frames, context, site, share, progress, self.profiles)
        return ClipRecord(key, unit, self._whole(site), self._profile(out))

    def of_video(
        self,
        key: str,
        unit: str,
        prompt: str,
        latents: Tensor,
        validates: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> ClipRecord:
        """A real video with its caption; the history at a site is the video's (teacher forcing).

        Args:
            key: Of video and noise.
            unit: Of the video.
            prompt: What the video shows.
            latents: ``[F, C, h, w]`` of the video.
            validates: Losses are measured exactly too.
            progress: As in :meth:`of_prompt`.

        Raises:
            ValueError: As :meth:`of_prompt` says.
        """
        chunk = self.model.network.config.chunk
        chunks = sites_of(key, len(latents), chunk, self.settings)
        share, found, out = 1 / (sum(own + 1 for own in chunks) + self._looked_up), {}, None
        memories = self._held(chunks, key, prompt, latents, share, progress)
        for own in chunks:
            site, last = self._site(key, (own,), validates, memories), own == chunks[-1]
            end = min((own + 1) * chunk, len(latents))
            known = latents[: own * chunk]
            out = self._roll(key, prompt, end, known, site, share, progress, self.profiles and last)
            found |= self._whole(site)
        return ClipRecord(key, unit, found, self._profile(out))

    @cached_property
    def memories(self) -> dict[str, Memory]:
        """Scorers that are memories."""
        return self.settings.memories(self.model.network.config.chunk)

    @property
    def _looked_up(self) -> int:
        """Times that a clip goes through the model for them, each about as long as a chunk."""
        return sum(len(own.looked_up) for own in self.memories.values())

    def _held(
        self,
        chunks: tuple[int, ...],
        key: str,
        prompt: str,
        latents: Tensor,
        share: float,
        progress: Callable[[float], None] | None,
    ) -> dict[str, Held]:
        """What memories hold when some chunks begin, by scorer."""
        with torch.inference_mode(False):
            latents = latents.clone()
        return {
            name: memory.held(
                self.model,
                chunks,
                key,
                prompt,
                latents,
                (lambda: progress(share)) if progress else None,
                **self._settings,
            )
            for name, memory in self.memories.items()
        }

    @property
    def _settings(self) -> dict[str, Any]:
        """Of every rollout."""
        return {
            "seed": self.seed,
            "latent_size": self.latent_size,
            "negative": self.negative,
            "backend": self.backend,
        }

    def _site(
        self,
        key: str,
        chunks: tuple[int, ...],
        validates: bool,
        memories: Mapping[str, Held],
    ) -> SiteRecorder:
        steps = len(self.model.network.config.timesteps)
        return SiteRecorder(key, self.settings, chunks, steps, validates, memories)

    def _roll(
        self,
        key: str,
        prompt: str,
        frames: int,
        context: Tensor | None,
        site: SiteRecorder | None,
        share: float,
        progress: Callable[[float], None] | None,
        profiles: bool,
    ) -> Rollout:
        with torch.inference_mode(False):  # what is given is read where gradients are taken
            given = None if context is None else context.clone().unsqueeze(0)
        return rollout(
            self.model,
            self.reference,
            prompt,
            frames,
            keys=[key],
            context=given,
            record=TABLES if profiles else (),
            decode=False,
            before=site,
            progress=lambda *_: progress(share) if progress else None,
            **self._settings,
        )

    def _whole(self, site: SiteRecorder) -> dict[tuple[int, int], dict[str, Tensor]]:
        """What was recorded.

        Raises:
            ValueError: The sampler did not come by every site.
        """
        steps = {own % site.steps for own in self.settings.steps}
        wanted = {(chunk, step) for chunk in site.chunks for step in steps}
        if missing := sorted(wanted - site.records.keys()):
            sampler = self.model.network.config.sampler
            raise ValueError(
                f"Clip {site.key!r} has no pass of its own at (chunk, step) "
                f"{', '.join(map(str, missing))}: the sampler {sampler!r} makes none. "
                "Measure at steps that it has, of a model that makes one chunk at a time."
            )
        return site.records

    def _profile(self, out: Rollout | None) -> dict[str, Tensor]:
        """What heads attended to in the chunks that read all that came before them."""
        if not self.profiles:
            return {}
        chunks, frames = profiled(self.settings.reach, self.model.network.config.chunk)
        mass = out.tables["mass"][0].mass[CONDITIONAL][:chunks, ..., :frames]
        logits = out.tables["lags"][0].logits[CONDITIONAL][..., : self.settings.reach + 1]
        return {"mass": mass.cpu().double(), "logits": logits.cpu().double()}


def profiled(reach: int, chunk: int) -> tuple[int, int]:
    """Chunks at the start of a clip whose whole history is within reach, and their frames.

    There the reference is no other than the full cache, so labels are those of the full cache.
    """
    chunks = reach // chunk + 1
    return chunks, chunks * chunk


def profile_of(tables: Mapping[str, Tensor], chunk: int) -> Profile:
    """A profile from the ``profile`` of a record, or a mean of such."""
    mass = tables["mass"]
    starts = tuple(range(0, (len(mass) + 1) * chunk, chunk))
    return Profile(mass, starts, tables["logits"])
