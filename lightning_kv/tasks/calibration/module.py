"""The bases of modules that roll clips out and measure them, one record each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import lightning as L
import torch

from lightning_kv.calibration.clips import ClipMeter
from lightning_kv.calibration.sites import SiteSettings, sites_of
from lightning_kv.data.datamodule import PromptDataModule, PromptSample, RolloutItem
from lightning_kv.data.videos import VideoError, probe
from lightning_kv.models.codec import PatchCodec
from lightning_kv.models.loading import load_model
from lightning_kv.models.samplers import NOISE_REVISION
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import load_policy, policy_to_dict
from lightning_kv.tasks.calibration.conclude import check_enough
from lightning_kv.tasks.calibration.records import Wanted
from lightning_kv.tasks.measuring.fingerprint import plugged
from lightning_kv.tasks.rollouts.context import (
    check_codec,
    check_context,
    check_prompts,
    latent_frames,
    start_of,
    video_start,
)
from lightning_kv.tasks.rollouts.lengths import read_size
from lightning_kv.tasks.rollouts.policies import check_inputs
from lightning_kv.tasks.rollouts.settings import RolloutSettings


class RecordsModule(L.LightningModule):
    """Rolls clips out and measures something in each of them.

    A step gives a record of each clip; nothing is written unless a
    :class:`~lightning_kv.tasks.callbacks.clip_records.ClipRecordWriter` does. Ranks do not speak to
    each other. Data are prompts, whose clips the model makes itself, or ``context_videos``, whose
    own frames are then the history (teacher forcing).

    Args:
        model: The model, or its name as :func:`lightning_kv.load_model` takes it.
        reference: Policy that others are compared with.
        frames: Latent frames per clip, what is given included; the model's own where None.
        context_frames: Given frames at the start, of the panorama's worlds; not for videos.
        size: HEIGHTxWIDTH in pixels; the model's own where None.
        seed: Of the noise.
        negative: What guidance leads away from (models with guidance).
        backend: Attention kernel, sdpa or reference.

    Attributes:
        heard: Called with the key of a clip and by how much of it is further; callbacks add to it.
    """

    task: ClassVar[str]
    """What it does, in the fingerprint of a run."""
    use: ClassVar[str]
    """What clips are there for, in errors, such as ``calibrated on``."""
    meter: Any
    """Measures a clip: has ``of_prompt`` and ``of_video`` of
    :class:`~lightning_kv.calibration.clips.ClipMeter`, whatever their records are."""

    def __init__(
        self,
        model: VideoModel | str,
        reference: str | dict[str, Any] | CachePolicy,
        *,
        frames: int | None = None,
        context_frames: int | None = None,
        size: str | None = None,
        seed: int = 0,
        negative: str = "",
        backend: str = "sdpa",
    ) -> None:
        super().__init__()
        model = load_model(model, decode=False) if isinstance(model, str) else model
        config, self.world = model.network.config, isinstance(model.codec, PatchCodec)
        self.settings = RolloutSettings(
            frames, context_frames, size, seed, negative, backend, decode=False
        ).filled(None if self.world else config)
        self.reference = load_policy(reference)
        self.model_name, self.source = model.name, model.source
        self.network, self.codec, self.encoder = model.network, model.codec, model.encoder
        self.heard: list[Callable[[str, float], None]] = []
        self.validating: frozenset[str] = frozenset()

    def check_policies(self, policies: Sequence[CachePolicy]) -> None:
        """Refuse settings of rollouts that do not fit the model or a policy.

        Raises:
            ValueError: The first that does not.
        """
        self.settings.check(self.model_name, self.network.config, policies, self.world)
        check_inputs(policies, self.model_name, self.world)

    @property
    def model(self) -> VideoModel:
        """The model, on this rank's device."""
        return VideoModel(self.network, self.codec, self.encoder, self.source, self.model_name)

    def describe(self) -> dict[str, Any]:
        """Everything that a record depends on beside its clip: part of a run's fingerprint."""
        settings = vars(self.settings)
        return {
            "task": self.task,
            "model": self.model_name,
            "source": self.source,
            "config": self.network.config.to_dict(),
            "reference": policy_to_dict(self.reference),
            **plugged([self.reference]),
            **{name: settings[name] for name in sorted(settings) if name not in ("decode", "fps")},
            "noise_revision": NOISE_REVISION,
        }

    def validated(self, data: PromptDataModule) -> frozenset[str]:
        """Keys of prompts that validate."""
        return frozenset()

    def wanted(self, data: PromptDataModule) -> dict[str, Wanted]:
        """What is wanted of every clip, in the order of the data."""
        chosen = self.validated(data)
        return {item.key: Wanted(item.prompt, item.prompt.key in chosen) for item in data.items()}

    def check_length(self, frames: int, given: int = 0) -> None:
        """Refuse clips in which nothing can be measured.

        Args:
            frames: Latent frames.
            given: How many of them are not made.

        Raises:
            ValueError: They are too short.
        """
        raise NotImplementedError

    def check_count(self, prompts: int) -> None:
        """Refuse too few prompts.

        Raises:
            ValueError: They are.
        """
        check_enough(prompts, "are asked for")

    def check_data(self, data: Any) -> None:
        """Refuse prompts and videos that cannot be measured.

        Raises:
            ValueError: They are no prompts, too few, or a video is too short.
        """
        if not isinstance(data, PromptDataModule):
            raise ValueError(
                f"{type(self).__name__} measures the clips of prompts, and "
                f"{type(data).__name__} was given. Call trainer.test(module, "
                "datamodule=PromptDataModule(...)); real videos are its context_videos."
            )
        data.keys()  # two clips with one key would share noise and records
        self.check_count(data.total)
        if data.video_infos:
            self._check_videos(data)
            return
        settings = self.settings
        check_context(self.model_name, self.network.config, self.world, settings, data)
        self.check_length(settings.frames, settings.context_frames)

    def _check_videos(self, data: PromptDataModule) -> None:
        """Refuse videos that are shorter than what is measured."""
        check_codec(self.model_name, self.codec)
        captions = {sample.prompt: sample.video for sample in data.prompt_samples()}
        check_prompts(self.model, captions)
        config = self.network.config
        for info in data.video_infos.values():
            frames = min(self.settings.frames, latent_frames(info.frames, config))
            try:
                self.check_length(frames)
            except ValueError as error:
                raise VideoError(
                    f"{info.path} is too short to be {self.use}: it has {info.frames} frames. "
                    f"{error}"
                ) from error

    def setup(self, stage: str) -> None:
        """Check the data, and know which prompts validate, before the first rollout."""
        self.check_data(self.trainer.datamodule)
        self.validating = self.validated(self.trainer.datamodule)

    def on_test_start(self) -> None:
        """Weights are constants: gradients are those of attention."""
        self.network.requires_grad_(False)

    def test_step(self, batch: list[RolloutItem], batch_idx: int) -> dict[str, list[Any]]:
        """Measure some clips, one after the other.

        Args:
            batch: Prompts and noises.
            batch_idx: Unused.

        Returns:
            A record of each, under ``clips``, and its prompt, under ``samples``.
        """
        records = [self.measured(item) for item in batch]
        return {"clips": records, "samples": [item.prompt for item in batch]}

    def measured(self, item: RolloutItem) -> Any:
        """The record of one clip."""
        sample, key = item.prompt, item.key
        validates = sample.key in self.validating

        def progress(share: float) -> None:
            for hear in self.heard:
                hear(key, share)

        told = (key, sample.key, sample.prompt)
        if sample.video is not None:
            return self.meter.of_video(*told, self._latents(sample), validates, progress)
        context = start_of(sample, self.model, self.settings).context
        return self.meter.of_prompt(*told, context, validates, progress)

    def _latents(self, sample: PromptSample) -> torch.Tensor:
        """A video in latents, as many whole chunks as it has and a clip may have."""
        shown = probe(sample.video).frames
        frames = min(latent_frames(shown, self.network.config), self.settings.frames)
        whole = replace(self.settings, frames=frames, context_frames=frames)
        return video_start(sample, self.model, whole).context


class SitesModule(RecordsModule):
    """Rolls the reference out and measures something at the sites of each clip.

    A record is a :class:`~lightning_kv.calibration.clips.ClipRecord`.

    Args:
        model: The model, or its name as :func:`lightning_kv.load_model` takes it.
        measuring: What is measured, and where.
        reference: Policy that is rolled out; the usual one where None.
        labels: Also record what heads attend to, for the labels of presets.
        rollouts: frames, context_frames, size, seed, negative and backend, see the base.

    Raises:
        ValueError: A setting does not fit the model, or a clip is too short.
    """

    use: ClassVar[str] = "calibrated on"
    meter: ClipMeter

    def __init__(
        self,
        model: VideoModel | str,
        measuring: SiteSettings,
        reference: str | dict[str, Any] | CachePolicy | None = None,
        *,
        labels: bool = False,
        **rollouts: Any,
    ) -> None:
        super().__init__(model, reference or usual_reference(measuring), **rollouts)
        self.measuring, self.labels = measuring, labels
        self.check_length(self.settings.frames)
        self.check_policies([self.reference])

    def metered(self, kind: type[ClipMeter], **own: Any) -> ClipMeter:
        """A meter with the settings of this module.

        Args:
            kind: Its class.
            own: Settings that only this class has.
        """
        settings = self.settings
        return kind(
            self.model,
            self.reference,
            self.measuring,
            settings.frames,
            settings.seed,
            read_size(settings.size, self.network.config),
            settings.negative,
            settings.backend,
            self.labels,
            **own,
        )

    def describe(self) -> dict[str, Any]:
        """Everything that a record depends on beside its clip: part of a run's fingerprint."""
        return super().describe() | {"measuring": asdict(self.measuring), "labels": self.labels}

    def check_length(self, frames: int, given: int = 0) -> None:
        """Refuse clips that are shorter than the reach and the sites behind it.

        Raises:
            ValueError: They are.
        """
        sites_of("", frames, self.network.config.chunk, self.measuring, given)


def usual_reference(measuring: SiteSettings) -> str | dict[str, Any]:
    """Everything where a scorer is a memory; else the newest frames within reach, and the sink."""
    if measuring.memories(1):
        return "full"
    name = f"{'sink' if measuring.sink else 'sliding'}-window@{measuring.reach}f"
    retain = {"part": "window", "sink": measuring.sink, "budget": f"{measuring.reach}f"}
    return {"name": name, "retain": retain}
