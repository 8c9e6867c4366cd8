"""How the rollouts of a run are made: settings that depend on the model, filled in and checked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_kv.cache.kernels import known_backend
from lightning_kv.cache.record import recorders
from lightning_kv.cache.recorder import Clip
from lightning_kv.models.wan import WanConfig
from lightning_kv.policies.base import CachePolicy
from lightning_kv.tasks.rollouts.lengths import read_size
from lightning_kv.tasks.rollouts.policies import needs_of
from lightning_kv.tasks.trainer import is_first
from lightning_kv.utilities.formatting import format_bytes

log = logging.getLogger(__name__)

WORLD = {"frames": 72, "context_frames": 15, "fps": 8.0}
"""Usual settings in the panorama."""


@dataclass(frozen=True)
class RolloutSettings:
    """Everything that a rollout depends on beside model, policy and prompt.

    Args:
        frames: Latent frames per clip, the context included.
        context_frames: Given frames at the start: of the panorama's world, or of videos.
        size: HEIGHTxWIDTH in pixels; None for that of the model.
        seed: Of the noise.
        negative: What guidance leads away from.
        backend: Attention kernel.
        decode: Make pixels.
        fps: Pixel frames per second.
    """

    frames: int | None = None
    context_frames: int | None = None
    size: str | None = None
    seed: int = 0
    negative: str = ""
    backend: str = "sdpa"
    decode: bool = True
    fps: float | None = None

    def filled(self, config: WanConfig | None) -> RolloutSettings:
        """What was not given, as the model wants it; None is the panorama's."""
        usual = WORLD
        if config is not None:
            usual = {"frames": config.train_horizon, "context_frames": 0, "fps": config.fps}
        missing = {name: value for name, value in usual.items() if getattr(self, name) is None}
        return replace(self, **missing)

    def check(
        self, model: str, config: WanConfig, policies: Iterable[CachePolicy], world: bool = False
    ) -> None:
        """Refuse kernel, frames, size, budgets and tables that do not work, before anything is run.

        Args:
            model: Its name.
            config: Its shape.
            policies: All of them, the reference included.
            world: Whether the model is of the panorama, which has one size only.

        Raises:
            ValueError: The first that does not.
        """
        known_backend(self.backend)
        check_negative(self.negative, model, config)
        config.plan(self.frames, self.context_frames)
        size = read_size(self.size, config)
        if world and size != config.latent_size:
            own = "x".join(str(config.stride[1] * side) for side in config.latent_size)
            raise ValueError(
                f"The panorama world is seen in one size. Given --size {self.size}. Use "
                f"{own}, or leave --size out."
            )
        geometry = config.geometry(size)
        policies = list(policies)
        for policy in policies:
            policy.check(geometry, config.chunk, self.frames)
        self._check_tables(config, policies)
        if self.frames > config.train_horizon and is_first():
            warnings.warn(
                f"{self.frames} frames exceed the {config.train_horizon} that {model} was trained "
                "for: the reference itself may fail.",
                stacklevel=2,
            )

    def _check_tables(self, config: WanConfig, policies: list[CachePolicy]) -> None:
        """Say what the reference tables take, and refuse those that take too much."""
        geometry = config.geometry(read_size(self.size, config))
        count = config.plan(self.frames, self.context_frames).count
        clip = Clip(None, 0, self.frames, count, geometry, config.passes)
        for recorder in recorders(needs_of(policies)):
            recorder.begin([clip])
            size = format_bytes(recorder.size(clip))
            log.info("The reference rollout records %s: %s per clip.", recorder.name, size)


def check_negative(negative: str, model: str, config: WanConfig) -> None:
    """Refuse a negative prompt that nothing would read.

    Raises:
        ValueError: The model runs without guidance.
    """
    if negative and config.guidance == 1:
        raise ValueError(
            f"--negative {negative!r} does nothing: {model!r} runs without guidance. Leave it "
            "out, or use a model file with `guidance:` above 1."
        )
