"""One clip after the other: rolled out under a scorer and its teacher, and made into lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_kv.distillation.collect import Taught
from lightning_kv.distillation.labels import Teacher
from lightning_kv.distillation.lists import Lists
from lightning_kv.distillation.samples import lists_of_clip
from lightning_kv.distillation.shadow import pushed_through, shadow_tables
from lightning_kv.models.samplers import stable_seed
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.budget.uniform import Uniform
from lightning_kv.policies.registry import preset
from lightning_kv.policies.retain.oracle import Oracle
from lightning_kv.policies.scorer.artifact import Scorer
from lightning_kv.rollout import rollout
from lightning_kv.utilities.formatting import several

LABELS = ("reference", "shadow")
"""What says what frames turned out to be worth: the reference rollout of the same prompt and noise,
or a cache that drops nothing on the clip's own latents."""
SHARE = 0.5  # of the commits that a teacher decided, it decides in the next round


@dataclass(frozen=True)
class Collecting:
    """How clips are made into lists.

    Args:
        teacher: Says what frames are worth.
        labels: Where from, see :data:`LABELS`; of videos always from their own latents.
        budgets: History frames per head, one of which is drawn for each clip.
        round: In round r the teacher decides ``0.5 ** r`` of the commits, and the scorer the
            others. In clips that validate the scorer decides all, but in round 0.
        queries: Later queries whose outputs go along with a list.

    Raises:
        ValueError: Labels are unknown, or there are no budgets.
    """

    teacher: Teacher
    labels: str = "reference"
    budgets: tuple[int, ...] = (9,)
    round: int = 0
    queries: int = 4

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ValueError(
                f"Labels {self.labels!r} are unknown. Use reference (the reference rollout of the "
                "same prompt and noise) or shadow (a full cache on the clip's own latents)."
            )
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(
                f"Budgets {list(self.budgets)} give heads nothing to keep. Give history frames per "
                "head, such as 6,9,12."
            )

    def share(self, validates: bool) -> float:
        """Of the commits of a clip, how many the teacher decides."""
        return 0.0 if validates and self.round else SHARE**self.round

    def budget(self, key: str) -> int:
        """That of a clip, told by its key and the round alone."""
        return self.budgets[stable_seed(f"budget {self.round}", key) % len(self.budgets)]

    def decides(self) -> Oracle:
        """The teacher as a policy: by outputs where these are its target, else by mass."""
        told, outputs = self.teacher, self.teacher.target == "out-future"
        return Oracle(
            objective="output" if outputs else "mass",
            discount=told.discount,
            horizon=told.horizon,
            queries=told.queries,
        )

    def policy(self, scorer: Scorer, budget: int, share: float) -> CachePolicy:
        """What a clip is rolled out under."""
        frames = Uniform(f"{budget}f")
        teacher = replace(self.decides(), budget=frames)
        taught = Taught(budget=frames, scorer=scorer, teacher=teacher, share=share)
        return replace(preset("full"), name="taught", retain=taught)


@dataclass(frozen=True, eq=False)
class ClipLists:
    """What was learned from one clip.

    Args:
        key: Of prompt and noise.
        unit: Key of the prompt, which statistics count.
        validates: Whether its prompt is held out.
        lists: Its decisions; None where nothing had to be dropped.
        chunks: Chunks of the clip.
        budget: History frames of each head.
    """

    key: str
    unit: str
    validates: bool
    lists: Lists | None
    chunks: int
    budget: int


@dataclass(frozen=True, eq=False)
class ClipCollector:
    """Makes clips into lists: a record depends on these settings and the clip alone.

    Args:
        model: Any that commits frames in a clean pass.
        scorer: Decides, where the teacher does not.
        collecting: How.
        frames: Latent frames of a clip, what is given included.
        seed: Of the noise.
        latent_size: Latent height and width; the model's own where None.
        negative: What guidance leads away from.
        backend: Attention kernel.
    """

    model: VideoModel
    scorer: Scorer
    collecting: Collecting
    frames: int
    seed: int = 0
    latent_size: tuple[int, int] | None = None
    negative: str = ""
    backend: str = "sdpa"

    def of_prompt(
        self,
        key: str,
        unit: str,
        prompt: str,
        context: Tensor | None = None,
        validates: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> ClipLists:
        """A clip that the model makes of a prompt.

        Args:
            key: Of prompt and noise.
            unit: Of the prompt.
            prompt: What the model is told.
            context: Given latents ``[frames, C, h, w]`` at the start.
            validates: Whether the prompt is held out.
            progress: Told after every chunk by how much of the clip it is further.

        Raises:
            ValueError: Labels are not finite.
        """
        own, policy = self.collecting, self._policy(key, validates)
        needs = dict(policy.retain.needs)
        if own.labels == "reference":
            needs |= own.teacher.needs
        given = None if context is None else context.unsqueeze(0)
        count = self.model.network.config.plan(self.frames, 0).count
        share = 1 / (count * (1 + bool(needs)))
        told = {
            "frames": self.frames,
            "keys": [key],
            "context": given,
            "decode": False,
            "progress": (lambda *_: progress(share)) if progress else None,
            **self._settings,
        }
        tables: Mapping[str, Any] = {}
        if needs:
            tables = rollout(self.model, preset("full"), prompt, record=needs, **told).tables
        asked = {name: tables[name] for name in policy.retain.needs}
        made = rollout(self.model, policy, prompt, tables=asked, **told)
        labels = {name: table[0] for name, table in tables.items()}
        if own.labels == "shadow":
            labels = self._shadow(made.latents[0], key, prompt, own.teacher.needs)
        return self._record(key, unit, validates, policy, labels)

    def of_video(
        self,
        key: str,
        unit: str,
        prompt: str,
        latents: Tensor,
        validates: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> ClipLists:
        """A real video with its caption, whose own frames are the history (teacher forcing).

        Args:
            key: Of video and noise.
            unit: Of the video.
            prompt: What the video shows.
            latents: ``[F, C, h, w]`` of the video.
            validates: Whether the video is held out.
            progress: As in :meth:`of_prompt`.

        Raises:
            ValueError: As there.
        """
        policy = self._policy(key, validates)
        needs = dict(policy.retain.needs) | self.collecting.teacher.needs
        labels = self._shadow(latents, key, prompt, needs)
        asked = {name: [labels[name]] for name in policy.retain.needs}
        pushed_through(self.model, policy, latents, key, prompt, tables=asked, **self._settings)
        if progress:
            progress(1.0)
        return self._record(key, unit, validates, policy, labels)

    def _policy(self, key: str, validates: bool) -> CachePolicy:
        own = self.collecting
        return own.policy(self.scorer, own.budget(key), own.share(validates))

    @property
    def _settings(self) -> dict[str, Any]:
        """Of every rollout."""
        return {
            "seed": self.seed,
            "latent_size": self.latent_size,
            "negative": self.negative,
            "backend": self.backend,
        }

    def _shadow(
        self, latents: Tensor, key: str, prompt: str, needs: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        return shadow_tables(self.model, latents, key, prompt, needs, **self._settings)

    def _record(
        self,
        key: str,
        unit: str,
        validates: bool,
        policy: CachePolicy,
        tables: Mapping[str, Any],
    ) -> ClipLists:
        """Lists of what was watched.

        Raises:
            ValueError: They are not finite.
        """
        own, chunks = self.collecting, tables["mass"].clip.chunks
        lists = lists_of_clip(policy.retain.watched, tables, own.teacher, key, own.queries)
        if lists is not None:
            lists = lists.to("cpu")
            check_finite(lists, key)
        return ClipLists(key, unit, validates, lists, chunks, own.budget(key))


def check_finite(lists: Lists, key: str) -> None:
    """Refuse lists with NaN or infinite numbers.

    Raises:
        ValueError: Names them.
    """
    names = ("features", "context", "target", "weight", "share", "gram")
    wrong = [
        name
        for name in names
        if (own := getattr(lists, name)) is not None and not bool(torch.isfinite(own).all())
    ]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} of clip {key!r} ({several(len(lists), 'list')}) are not finite. "
            "The model gives no usable numbers here: try --precision reference, and look at the "
            "clip."
        )
