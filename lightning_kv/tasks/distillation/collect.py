"""Collect what a scorer is taught on: clips are rolled out, and their decisions written down."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from lightning_kv.data.datamodule import PromptDataModule
from lightning_kv.distillation.clips import ClipCollector, Collecting
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.head_curves import described
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.policies.scorer.features import FEATURES, feature_hash
from lightning_kv.runs.directory import fingerprint
from lightning_kv.tasks.calibrate import validating
from lightning_kv.tasks.calibration.module import RecordsModule
from lightning_kv.tasks.calibration.records import Wanted
from lightning_kv.tasks.callbacks.clip_records import ClipRecordWriter
from lightning_kv.tasks.distillation.records import ListDirectory
from lightning_kv.tasks.measuring.fingerprint import weights_of
from lightning_kv.tasks.rollouts.lengths import read_size

FEWEST = 2  # prompts that a student is taught on
FAR = (5, 6)
"""Chunks of history of the usual budgets above four chunks."""


class CollectModule(RecordsModule):
    """Rolls clips out under a scorer and its teacher, and makes lists of their decisions.

    Run it with ``Trainer(...).test(module, datamodule=PromptDataModule(...))`` and a
    :class:`ListWriter`.

    Args:
        model: The model, or its name as :func:`lightning_kv.load_model` takes it.
        collecting: How clips are made into lists; budgets that are usual for the model where None.
        scorer: Of the round before; none in round 0, where the teacher decides.
        validate: So many prompts are held out, the first by a hash of their keys.
        held_out: Roll out those prompts alone.
        rollouts: frames, context_frames, size, seed, negative and backend, see the base.

    Raises:
        ValueError: A setting does not fit the model, or clips are too short for a budget.
    """

    task: ClassVar[str] = "distill"
    use: ClassVar[str] = "learned from"

    def __init__(
        self,
        model: VideoModel | str,
        collecting: Collecting,
        scorer: Scorer | None = None,
        *,
        validate: int = 8,
        held_out: bool = False,
        **rollouts: Any,
    ) -> None:
        super().__init__(model, "full", **rollouts)
        if validate < 0:
            raise ValueError(f"{validate} prompts cannot validate. Give 0 for none, or more.")
        if collecting.round and scorer is None:
            raise ValueError(
                f"In round {collecting.round} a scorer decides, and none was given. Give that of "
                "the round before, or round 0."
            )
        self.geometry = self.network.geometry(read_size(self.settings.size, self.network.config))
        self.scorer = scorer or Scorer.fresh("linear", self.geometry)
        self.collecting, self.validate, self.held_out = collecting, validate, held_out
        self.check_length(self.settings.frames)
        made = [collecting.policy(self.scorer, own, 0.0) for own in collecting.budgets]
        self.check_policies([self.reference, *made])

    @cached_property
    def meter(self) -> ClipCollector:
        """Makes clips into lists."""
        settings = self.settings
        return ClipCollector(
            self.model,
            self.scorer,
            self.collecting,
            settings.frames,
            settings.seed,
            read_size(settings.size, self.network.config),
            settings.negative,
            settings.backend,
        )

    def describe(self) -> dict[str, Any]:
        """Everything that a record depends on beside its clip: part of a run's fingerprint."""
        return super().describe() | {"made": self.made()}

    def made(self) -> dict[str, Any]:
        """What a record says of how it was made."""
        own = self.collecting
        return {
            "teacher": asdict(own.teacher),
            "labels": own.labels,
            "budgets": list(own.budgets),
            "round": own.round,
            "queries": own.queries,
            "features": list(FEATURES),
            "feature_hash": feature_hash(tuple(FEATURES)),
            "rows": self.scorer.queries,
            "scorer": mark_of_scorer(self.scorer) if own.round else None,
            "layers": self.geometry.layers,
            "heads": self.geometry.heads,
        }

    def about(self) -> dict[str, Any]:
        """What the file of a scorer says of model, teacher and settings."""
        own, network, told = self.collecting, self.network, self.describe()
        return {
            "model": {
                "name": network.config.model or self.model_name,
                "fingerprint": weights_of(self.model),
                "geometry": described(self.geometry),
                "schedule": list(network.config.timesteps),
                "precision": self.source.get("precision", "float32"),
            },
            "teacher": asdict(own.teacher),
            "labels": own.labels,
            "budgets": list(own.budgets),
            "cache": {"reference": told["reference"]},
            "settings": {"fingerprint": f"sha256:{fingerprint(told)}"},
        }

    def validated(self, data: PromptDataModule) -> frozenset[str]:
        """Keys of held-out prompts."""
        return validating([sample.key for sample in data.prompt_samples()], self.validate)

    def wanted(self, data: PromptDataModule) -> dict[str, Wanted]:
        """What is wanted of every clip, in the order of the data."""
        found = super().wanted(data)
        return {key: own for key, own in found.items() if own.validates or not self.held_out}

    def check_count(self, prompts: int) -> None:
        """Refuse too few prompts.

        Raises:
            ValueError: Too few are left to be taught on.
        """
        check_prompts(prompts, self.validate)

    def check_length(self, frames: int, given: int = 0) -> None:
        """Refuse clips in which a budget never makes a frame give way that is looked at later.

        Raises:
            ValueError: It is so.
        """
        chunk, budgets = self.network.config.chunk, self.collecting.budgets
        check_budgets(budgets, frames, chunk)


def check_budgets(budgets: tuple[int, ...], frames: int, chunk: int) -> None:
    """Refuse budgets with which there is nothing to decide.

    Args:
        budgets: History frames per head.
        frames: Latent frames of a clip.
        chunk: Frames of a chunk.

    Raises:
        ValueError: Names the first.
    """
    most = frames - chunk - 1
    if most <= chunk:
        raise ValueError(
            f"Clips of {frames} frames are too short to teach anything: the newest {chunk} "
            f"always stay, and what is dropped must be missed later. Give {2 * chunk + 2} or more "
            "(--frames)."
        )
    for own in budgets:
        if not chunk < own <= most:
            raise ValueError(
                f"A budget of {own} frames teaches nothing: the newest {chunk} always stay, and a "
                f"clip of {frames} frames has {frames - chunk} before its last chunk. Give budgets "
                f"from {chunk + 1} to {most}, or longer clips (--frames)."
            )


def usual_budgets(frames: int, chunk: int) -> tuple[int, ...]:
    """Budgets that a scorer is taught at where nobody says, as far as clips are long enough.

    >>> usual_budgets(72, 3)
    (4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 18)
    """
    low = chunk + 1
    every = [*range(low, max(low + 8, 4 * chunk) + 1), *(own * chunk for own in FAR)]
    return tuple(sorted({own for own in every if own < frames - chunk}))


def check_prompts(prompts: int, validate: int) -> None:
    """Refuse fewer prompts than a student can be taught on beside those that are held out.

    Raises:
        ValueError: They are too few.
    """
    if prompts - validate < FEWEST:
        raise ValueError(
            f"Too few prompts: {prompts} are asked for, and {validate} of them are held out, so "
            f"{max(0, prompts - validate)} are left to be taught on. Give {validate + FEWEST} or "
            "more (--prompts), or hold out fewer (--validate)."
        )
    if validate == 1:
        warnings.warn(
            "One held-out prompt tells nothing of its own noise. Hold out 2 or more; 8 are better.",
            stacklevel=2,
        )


def mark_of_scorer(scorer: Scorer) -> str:
    """What tells a scorer's weights, features and queries from others: SHA-256, 16 digits."""
    weights = {name: own.tolist() for name, own in sorted(scorer.student.state_dict().items())}
    told = {"features": list(scorer.features), "queries": scorer.queries, "weights": weights}
    return fingerprint(told | {"student": scorer.student.settings})[:16]


class ListWriter(ClipRecordWriter):
    """Writes the lists of each clip, see :mod:`lightning_kv.tasks.distillation.records`."""

    measured_by: ClassVar[type[CollectModule]] = CollectModule
    directory: ClassVar[type[ListDirectory]] = ListDirectory

    def setup(self, trainer: L.Trainer, pl_module: CollectModule, stage: str) -> None:
        """Take up what an earlier start has left; records will say how they were made."""
        super().setup(trainer, pl_module, stage)
        if stage == "test":
            self.run.made = pl_module.made()

    def concluded(
        self, trainer: L.Trainer, module: CollectModule, wanted: Mapping[str, Wanted]
    ) -> Path:
        """The folder, of which others learn."""
        return self.run.path
