"""Calibrate head budgets: what each head loses when it reads fewer frames, clip by clip."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from lightning_kv.calibration.clips import ClipMeter
from lightning_kv.calibration.scorers import scorer_of
from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.models.samplers import stable_seed
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.head_curves import described
from lightning_kv.runs.directory import fingerprint
from lightning_kv.tasks.calibration.module import SitesModule
from lightning_kv.tasks.measuring.fingerprint import weights_of
from lightning_kv.tasks.rollouts.lengths import read_size


class CalibrateModule(SitesModule):
    """Rolls the reference out and judges every head at the sites of each clip.

    Run it with ``Trainer(...).test(module, datamodule=PromptDataModule(...))`` and a
    :class:`~lightning_kv.tasks.callbacks.CurveWriter`.

    Args:
        model: The model, or its name as :func:`lightning_kv.load_model` takes it.
        measuring: What is measured in a pass.
        reference: Policy that losses are against; where None a window over the reach, with the
            sink, or everything where a scorer is a memory.
        validate: So many prompts are also measured exactly, the first by a hash of their keys.
        labels: Also record what heads attend to, for the labels of presets.
        rollouts: frames, context_frames, size, seed, negative and backend, see the base.

    Raises:
        ValueError: A setting does not fit the model, or a clip is too short.
    """

    task: ClassVar[str] = "calibrate"

    def __init__(
        self,
        model: VideoModel | str = "panorama",
        measuring: SiteSettings | None = None,
        reference: str | dict[str, Any] | CachePolicy | None = None,
        *,
        validate: int = 4,
        labels: bool = True,
        **rollouts: Any,
    ) -> None:
        super().__init__(model, measuring or SiteSettings(), reference, labels=labels, **rollouts)
        for name in self.measuring.scorers:
            scorer_of(name)
        if validate < 0:
            raise ValueError(f"{validate} prompts cannot validate. Give 0 for none, or more.")
        self.validate = validate

    @cached_property
    def meter(self) -> ClipMeter:
        """Measures a clip."""
        return self.metered(ClipMeter)

    def about(self) -> dict[str, Any]:
        """What a file of curves says of model, cache, data and settings."""
        network, measuring = self.network, self.measuring
        geometry = network.geometry(read_size(self.settings.size, network.config))
        told = self.describe()
        return {
            "model": {
                "name": network.config.model or self.model_name,
                "fingerprint": weights_of(self.model),
                "geometry": described(geometry),
                "schedule": list(network.config.timesteps),
                "precision": self.source.get("precision", "float32"),
            },
            "cache": {
                "reference": told["reference"],
                "reach": measuring.reach,
                "sink": measuring.sink,
            },
            "data": {"seeds": [self.settings.seed], "frames": self.settings.frames},
            "settings": told["measuring"]
            | {"fingerprint": f"sha256:{fingerprint(told)}", "anchor": "full"},
        }

    def validated(self, data: PromptDataModule) -> frozenset[str]:
        """Keys of prompts that are also measured exactly."""
        return validating([sample.key for sample in data.prompt_samples()], self.validate)


def validating(keys: list[str], count: int) -> frozenset[str]:
    """The prompts that validate: the first by a hash of their keys, in whatever order they come."""
    return frozenset(sorted(set(keys), key=lambda key: (stable_seed("validate", key), key))[:count])
