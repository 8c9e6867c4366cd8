"""Evaluate cache policies: a clip per prompt, noise and policy, from the same prompt and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_kv.cache.probe import AttentionProbe
from lightning_kv.cache.session import CacheSession, Watch
from lightning_kv.data.datamodule import PromptDataModule, RolloutItem
from lightning_kv.metrics.suite import Suite
from lightning_kv.models.codec import PatchCodec
from lightning_kv.models.loading import load_model
from lightning_kv.models.samplers import NOISE_REVISION
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import load_policy, policy_to_dict
from lightning_kv.rollout import Rollout, rollout, together
from lightning_kv.tasks.measuring.adapter import Clip, Measured, features, measure
from lightning_kv.tasks.measuring.clip_module import ClipModule, ClipResult
from lightning_kv.tasks.measuring.fingerprint import plugged, weights_of
from lightning_kv.tasks.measuring.real_videos import real_videos
from lightning_kv.tasks.options import DEFAULT_POLICIES
from lightning_kv.tasks.rollouts.context import (
    Start,
    check_codec,
    check_context,
    check_poses,
    check_prompts,
    stack_context,
    stack_inputs,
    start_of,
)
from lightning_kv.tasks.rollouts.lengths import read_size
from lightning_kv.tasks.rollouts.outcome import broken, cost
from lightning_kv.tasks.rollouts.policies import (
    check_inputs,
    chosen_policies,
    foreign_curves,
    needs_of,
    warn_fitted,
)
from lightning_kv.tasks.rollouts.settings import RolloutSettings


@dataclass
class _Group:
    """Prompts that are rolled out together, and what their policies are compared with."""

    starts: list[Start]
    base: Rollout | None = None


class EvaluateModule(ClipModule):
    """Rolls out the reference and every policy, from the same prompt and noise, and measures.

    Run it with ``Trainer(...).test(module, datamodule=PromptDataModule(...))``. Nothing is written
    unless callbacks do: see :mod:`lightning_kv.tasks.callbacks`.

    Args:
        model: The model, or its name as :func:`lightning_kv.load_model` takes it.
        policies: Names, files, plain data or policies, in the order of the table.
        reference: What the others are compared with.
        metrics: Names and metrics; the usual ones for the model where None.
        frames: Latent frames per clip, the context included; the model's own where None.
        context_frames: Given frames at the start: those of the prompt's world in the panorama, or
            of its video (``PromptDataModule(context_videos=...)``) with any model whose codec can
            encode.
        size: HEIGHTxWIDTH in pixels; the model's own where None.
        seed: Of the noise.
        negative: What guidance leads away from (models with guidance).
        backend: Attention kernel, sdpa or reference.
        decode: Make pixels; without them there are no videos and no metrics of pixels.
        fps: Pixel frames per second; the model's own where None.
        real: Folder of real videos that sets of clips are compared with.
        accept_license: Licences accepted for weights that forbid commercial use.

    Raises:
        ValueError: A policy or metric is unknown, or a setting does not fit the model.

    Attributes:
        watching: Told of every pass of the rollouts of the next step; callbacks add to it.
        heard: Called after every chunk with its index and the session; callbacks add to it.
        begun: Called with the policy's name and the number of clips before every rollout.
    """

    def __init__(
        self,
        model: VideoModel | str = "panorama",
        policies: Sequence[str | dict[str, Any] | CachePolicy] = DEFAULT_POLICIES,
        reference: str | dict[str, Any] | CachePolicy = "full",
        metrics: Sequence[Any] | None = None,
        *,
        frames: int | None = None,
        context_frames: int | None = None,
        size: str | None = None,
        seed: int = 0,
        negative: str = "",
        backend: str = "sdpa",
        decode: bool = True,
        fps: float | None = None,
        real: str | Path | None = None,
        accept_license: Sequence[str] = (),
    ) -> None:
        model = load_model(model, decode=decode) if isinstance(model, str) else model
        config, world = model.network.config, isinstance(model.codec, PatchCodec)
        settings = RolloutSettings(
            frames, context_frames, size, seed, negative, backend, decode, fps
        ).filled(None if world else config)
        chosen, base = chosen_policies(policies, reference)
        settings.check(model.name, config, [base, *chosen.values()], world)
        check_inputs([base, *chosen.values()], model.name, world)
        suite = Suite(metrics, known(world, decode), accept_license)
        names = dict.fromkeys([base.name, *chosen])
        videos = real_videos(None if real is None else Path(real), suite)
        super().__init__(suite, list(names), base.name, videos)
        self.model_name, self.settings, self.world = model.name, settings, world
        self.policies, self.reference = chosen, base
        self.needs = needs_of(chosen.values())
        self.network, self.codec, self.encoder = model.network, model.codec, model.encoder
        self.source = model.source
        self.probed = any("attention" in choice.needs for choice in suite.choices.values())
        self.watching: list[Watch] = []
        self.heard: list[Callable[[int, CacheSession], None]] = []
        self.begun: list[Callable[[str, int], None]] = []
        self._groups: dict[tuple[str, ...], _Group] = {}

    @property
    def shows_truth(self) -> bool:
        """Whether sets are compared with what worlds, or videos, really show."""
        return self.settings.context_frames > 0 and self.settings.decode

    @property
    def model(self) -> VideoModel:
        """The model, on this rank's device."""
        return VideoModel(self.network, self.codec, self.encoder, self.source, self.model_name)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent height and width of every clip."""
        return read_size(self.settings.size, self.network.config)

    def describe(self) -> dict[str, Any]:
        """Everything that the numbers depend on beside the data: part of a run's fingerprint."""
        settings = vars(self.settings)
        return {
            "model": self.model_name,
            "source": self.source,
            "config": self.network.config.to_dict(),
            "policies": {name: policy_to_dict(each) for name, each in self.policies.items()},
            "reference": policy_to_dict(self.reference),
            **plugged([self.reference, *self.policies.values()]),
            **{name: settings[name] for name in sorted(settings)},
            "noise_revision": NOISE_REVISION,
        }

    def about(self) -> dict[str, Any]:
        """What a report must know of policies, rollouts and model."""
        settings, config = self.settings, self.network.config
        shown = config.pixel_frames(settings.frames)
        everyone = {self.reference.name: self.reference} | self.policies
        return {
            "policies": {name: policy_to_dict(policy) for name, policy in everyone.items()},
            "run": {
                "foreign_heads": self.foreign(),
                "hindsight": [name for name, policy in self.policies.items() if policy.needs],
                "frames": settings.frames,
                "pixel_frames": shown,
                "context_frames": settings.context_frames,
                "rate": settings.fps * settings.frames / shown,
                "size": settings.size,
                "seed": settings.seed,
                "noise_revision": NOISE_REVISION,
            },
            "model": {"name": self.model_name, **config.to_dict(), **self.source},
        }

    def foreign(self, warn: bool = False) -> list[str]:
        """What is to be said of head curves and scorers of other models or weights."""
        everyone = [self.reference, *self.policies.values()]
        geometry = self.network.geometry(self.latent_size)
        return foreign_curves(everyone, geometry, weights_of(self.model), warn)

    def check_data(self, data: Any) -> None:
        """Refuse prompts and videos that this module cannot roll out.

        Raises:
            ValueError: As `PromptDataModule.keys`, `check_context`, `check_codec` and
                `check_prompts` say.
        """
        if isinstance(data, PromptDataModule):
            data.keys()  # two rollouts with one key would share noise and results
        config, sets = self.network.config, [] if self.real else list(self.suite.set_metrics())
        check_context(self.model_name, config, self.world, self.settings, data, sets)
        if isinstance(data, PromptDataModule):
            everyone = [self.reference, *self.policies.values()]
            check_poses(everyone, config, self.settings, data)
            keys = {sample.key for sample in data.prompt_samples()}
            warn_fitted(everyone, self.network.geometry(self.latent_size), keys)
        self.foreign(warn=True)
        if getattr(data, "video_infos", None):
            check_codec(self.model_name, self.codec)
            if isinstance(data, PromptDataModule):
                captions = {sample.prompt: sample.video for sample in data.prompt_samples()}
                check_prompts(self.model, captions)
            elif hasattr(data, "prompt_texts"):  # else prompts are read as they come
                check_prompts(self.model, dict.fromkeys(data.prompt_texts()))

    def setup(self, stage: str) -> None:
        """Check the data, before the first rollout."""
        self.check_data(self.trainer.datamodule)

    def on_test_start(self) -> None:
        """Warm up, so that the first clip's timing is like the others'; encode real videos."""
        super().on_test_start()
        data = self.trainer.datamodule
        if isinstance(data, PromptDataModule) and data.left():
            batch = next(iter(data.test_dataloader()))
            frames = 2 * self.network.config.chunk
            self._roll(load_policy("full"), [batch[0].prompt.prompt], frames, decode=False)

    def test_step(self, batch: list[RolloutItem], batch_idx: int) -> dict[str, list[ClipResult]]:
        """The rollouts of some prompts under one policy, measured.

        Args:
            batch: Items of one policy; those of the reference come before the others'.
            batch_idx: Unused.

        Returns:
            One ``ClipResult`` per item, under ``clips``.
        """
        name, group = batch[0].policy, self._group(batch)
        probe = self._probe()
        watching = [*self.watching, *([probe] if probe else [])]
        policy = self.policies.get(name, self.reference)
        tables = {need: group.base.tables[need] for need in policy.needs}
        out = self._rollout(policy, batch, group.starts, watching, tables)
        group.base = group.base or out
        compared = group.base if name in self.policies else None  # asked for, or only compared
        last = name == self.names[-1]
        clips = []
        for index, item in enumerate(batch):
            clip = self._result(item, out, compared, group, index, probe)
            clip.last = last
            clips.append(clip)
        if last:
            self._groups.clear()
        self.watching.clear()
        return {"clips": clips}

    def forget(self) -> None:
        """Start anew: no clip is known, and no rollout is kept."""
        super().forget()
        self._groups.clear()

    @property
    def rolls_first(self) -> bool:
        """Whether the reference is rolled out once more, before all others.

        Asked for as a policy, it shows whether a rollout repeats; and recording takes time, which
        must not count as the reference's.
        """
        return self.reference.name in self.policies or bool(self.needs)

    def _group(self, batch: list[RolloutItem]) -> _Group:
        """What the items of a batch start from, and the reference's rollout, once there is one."""
        keys = tuple(item.key for item in batch)
        if keys not in self._groups:
            if batch[0].policy != self.reference.name:
                raise ValueError(
                    f"{batch[0].policy!r} came before the reference {self.reference.name!r} for "
                    f"{', '.join(keys)}. Give the rollouts of a prompt one after the other, in the "
                    "order of the module's names."
                )
            starts = [start_of(item.prompt, self.model, self.settings) for item in batch]
            group = self._groups[keys] = _Group(starts)
            if self.rolls_first:
                group.base = self._rollout(self.reference, batch, starts, [], record=self.needs)
        return self._groups[keys]

    def _result(
        self,
        item: RolloutItem,
        out: Rollout,
        compared: Rollout | None,
        group: _Group,
        index: int,
        probe: AttentionProbe | None,
    ) -> ClipResult:
        """What one clip of a rollout comes to; the metrics know of it then."""
        start, failure = group.starts[index], broken(out, group.base, index)
        measured, truth = Measured(dict.fromkeys(self.metrics_of(item.policy))), {}
        if not failure:
            clip = self._clip(start, out, compared, index, probe)
            measured = measure(self.metrics_of(item.policy), clip, self.encoders)
            if self._shows_truth(item) and start.real is not None:
                problems = measured.problems
                truth = features(start.real, self.encoders, clip.given_pixels, problems)
        result = ClipResult(
            name=item.policy,
            key=item.key,
            unit=item.prompt.key if self.world or item.prompt.video else item.prompt.prompt,
            prompt=item.prompt.prompt,
            sample=item.sample,
            measured=measured,
            cost=cost(out, group.base, index),
            failure=failure,
            latents=out.latents[index],
            pixels=pixels_of(out, index),
            truth=start.truth,
            real=truth,
            extra={"noise_revision": NOISE_REVISION},
        )
        self.add(result)
        return result

    def _shows_truth(self, item: RolloutItem) -> bool:
        """Whether this clip brings what really follows: once, not for every noise."""
        first = item.policy == self.reference.name and item.sample == 0
        return first and self.shows_truth and not self.real

    def _clip(
        self,
        start: Start,
        out: Rollout,
        compared: Rollout | None,
        index: int,
        probe: AttentionProbe | None,
    ) -> Clip:
        return Clip(
            latents=out.latents[index],
            pixels=pixels_of(out, index),
            reference_latents=None if compared is None else compared.latents[index],
            reference_pixels=pixels_of(compared, index),
            context=self.settings.context_frames,
            scene=start.scene,
            prompt=start.sample.prompt,
            fps=self.settings.fps,
            attention=None if probe is None else probe.curves(index),
        )

    def _probe(self) -> AttentionProbe | None:
        """What watches attention in the last denoising pass, where a metric wants it."""
        if not self.probed:
            return None
        return AttentionProbe([len(self.network.config.timesteps) - 1])

    def _rollout(
        self,
        policy: CachePolicy,
        batch: list[RolloutItem],
        starts: list[Start],
        watching: list[Watch],
        tables: dict[str, list[Any]] | None = None,
        record: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Rollout:
        for begun in self.begun:
            begun(policy.name, len(batch))
        made = self._roll(
            policy,
            [item.prompt.prompt for item in batch],
            self.settings.frames,
            keys=[item.key for item in batch],
            context=stack_context(starts),
            watch=together(watching),
            tables=tables,
            inputs=stack_inputs(starts, policy.inputs),
            record=record or {},
            progress=lambda chunk, session: [hear(chunk, session) for hear in self.heard],
        )
        made.session = None  # frees the cache before pixels are made, and before the next rollout
        if self.settings.decode:
            made.frames = self.codec.decode(made.latents.float())
        return made

    def _roll(self, policy: CachePolicy, prompts: list[str], frames: int, **given: Any) -> Rollout:
        return rollout(
            self.model,
            policy,
            prompts,
            frames,
            seed=self.settings.seed,
            latent_size=self.latent_size,
            negative=self.settings.negative,
            backend=self.settings.backend,
            **({"decode": False} | given),
        )


def known(world: bool, decode: bool) -> set[str]:
    """What metrics can know of a rollout."""
    found = {"latents", "reference_latents", "attention", "prompt", "fps"}
    if decode:
        found |= {"pixels", "reference_pixels"}
    return found | ({"scene"} if world else set())


def pixels_of(out: Rollout | None, index: int) -> Tensor | None:
    """Pixels of one clip, where there are any."""
    return None if out is None or out.frames is None else out.frames[index]
