"""Prove head budgets and scorers: what are they worth on prompts that did not choose them?"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lightning_kv.calibration.chunk_meter import ChunkMeter
from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.models.codec import PatchCodec
from lightning_kv.models.loading import load_model
from lightning_kv.models.samplers import stable_seed
from lightning_kv.models.video import VideoModel
from lightning_kv.stats.comparison import WORTH, prompts_planned
from lightning_kv.stats.proof import FAMILY, fewest_prompts
from lightning_kv.tasks.calibration.module import SitesModule
from lightning_kv.tasks.measuring.fingerprint import weights_of
from lightning_kv.tasks.proof.design import SHUFFLES, Design, Source, select_part
from lightning_kv.tasks.proof.scorer import warn_taught
from lightning_kv.tasks.proof.scorer_design import ScorerDesign, ScorerSource
from lightning_kv.tasks.proof.scorer_meter import ScorerMeter
from lightning_kv.tasks.rollouts.lengths import read_size
from lightning_kv.tasks.rollouts.policies import foreign_curves, warn_fitted
from lightning_kv.tasks.trainer import is_first
from lightning_kv.utilities.formatting import several

SPREAD = 0.15
"""Standard deviation of log-ratios between prompts that a number of prompts is planned with."""

NO_SITES = SiteSettings(2, ("mass",), chunks=1, steps=(0,), probes=0)
"""The least that there is, where whole rollouts are looked at and not sites."""


class ProveBudgetsModule(SitesModule):
    """Rolls the reference out and makes chunks of each clip again, once for each condition.

    Whole tables of budgets are judged, all by the same chunks. Run it with
    ``Trainer(...).test(module, datamodule=PromptDataModule(...))`` and a
    :class:`~lightning_kv.tasks.callbacks.ProofWriter`.

    Args:
        model: The model, or its name as :func:`lightning_kv.load_model` takes it.
        heads: File of head curves, or ``auto``.
        means: History frames per head; about 25, 35 and 50 % of the reach where empty.
        select: Part that chooses what is read, of whole frames by score.
        scorer: Of the curves; that of the select part where None.
        metric: Of the curves: gn, exact, output or mass.
        chunks: Chunks of a clip that are made again.
        shuffles: How often the optimal budgets are dealt to other heads.
        size: HEIGHTxWIDTH in pixels; the model's own where None.
        seed: Of the noise, and of which chunks.
        rollouts: frames, context_frames, negative and backend, see the base.

    Raises:
        ValueError: The file is no such, of another model, or has not these curves; a mean is
            outside of them; the part does not read whole frames; or as in the base.
    """

    task: ClassVar[str] = "prove budgets"

    def __init__(
        self,
        model: VideoModel | str = "panorama",
        heads: str | Path = "auto",
        means: Sequence[int] = (),
        select: str = "top-attention",
        scorer: str | None = None,
        metric: str = "gn",
        *,
        chunks: int = 3,
        shuffles: int = SHUFFLES,
        size: str | None = None,
        seed: int = 0,
        **rollouts: Any,
    ) -> None:
        part = select_part(select)
        model = load_model(model, decode=False) if isinstance(model, str) else model
        check_sampler(model)
        own = model.network.config.model or model.name
        source = Source.of(heads, own, select, scorer, metric)
        cache, curves = source.curves.about.get("cache", {}), source.curves
        geometry = model.network.geometry(read_size(size, model.network.config))
        source.table().check(geometry, transfer=False)
        super().__init__(
            model,
            SiteSettings(
                reach=curves.reach,
                scorers=("mass",),
                sink=cache.get("sink", 0),
                chunks=chunks,
                steps=(0,),
                probes=0,
                seed=stable_seed("prove", seed),
            ),
            cache.get("reference"),
            size=size,
            seed=seed,
            **rollouts,
        )
        self.design = Design(source, part, tuple(means), geometry, shuffles, weights_of(model))
        foreign_curves(self.design.policies(), geometry, self.design.weights, warn=True)
        for policy in self.design.policies():
            policy.check(geometry, model.network.config.chunk, self.settings.frames)

    @cached_property
    def meter(self) -> ChunkMeter:
        """Measures a clip."""
        return self.metered(ChunkMeter, ways=self.design.parts())

    def describe(self) -> dict[str, Any]:
        """Everything that a record depends on beside its clip: part of a run's fingerprint."""
        return super().describe() | {"design": self.design.describe()}

    def check_data(self, data: Any) -> None:
        """Refuse prompts that can show nothing, or cannot be measured; name those of the file.

        Raises:
            ValueError: They are too few, or as in the base.
        """
        super().check_data(data)
        check_prompts(data.total, self.design.rules)

    def setup(self, stage: str) -> None:
        """Check the data, and say which prompts the budgets were fitted on."""
        super().setup(stage)
        keys = {sample.key for sample in self.trainer.datamodule.prompt_samples()}
        warn_fitted(self.design.policies(), self.design.geometry, keys)


class ProveScorerModule(SitesModule):
    """Rolls the reference out, then memories under a scorer and its teacher, and judges rankings.

    Run it with ``Trainer(...).test(module, datamodule=PromptDataModule(...))`` and a
    :class:`~lightning_kv.tasks.callbacks.ScorerProofWriter`.

    Args:
        model: The model, or its name as :func:`lightning_kv.load_model` takes it.
        scorer: File of the scorer, or ``auto``.
        linear: File of a linear student that was taught alike; none is compared where None.
        budgets: History frames of each head; 6, 9 and 15 where empty.
        outputs: Whether outputs are judged too: the reference then records some, which takes
            memory. Where None, of the panorama's worlds, and where the teacher needs them.
        size: HEIGHTxWIDTH in pixels; the model's own where None.
        seed: Of the noise.
        rollouts: frames, context_frames, negative and backend, see the base.

    Raises:
        ValueError: A file is no scorer, or of a model of other sizes; a budget leaves nothing to
            choose; or as in the base.
    """

    task: ClassVar[str] = "prove scorer"

    def __init__(
        self,
        model: VideoModel | str = "panorama",
        scorer: str | Path = "auto",
        linear: str | Path | None = None,
        budgets: Sequence[int] = (),
        *,
        outputs: bool | None = None,
        size: str | None = None,
        seed: int = 0,
        **rollouts: Any,
    ) -> None:
        model = load_model(model, decode=False) if isinstance(model, str) else model
        config = model.network.config
        if config.sampler == "rolling":
            raise ValueError(
                f"A scorer cannot be judged on {model.name!r}: it looks at clean passes, and the "
                "sampler 'rolling' has none. Use a model that makes one chunk at a time."
            )
        own = config.model or model.name
        geometry = replace(model.network.geometry(read_size(size, config)), model=own)
        linear_source = None if linear is None else ScorerSource.of(linear, geometry)
        design = ScorerDesign(
            ScorerSource.of(scorer, geometry),
            linear_source,
            tuple(budgets),
            geometry,
            isinstance(model.codec, PatchCodec) if outputs is None else outputs,
            weights_of(model),
        )
        super().__init__(
            model,
            NO_SITES,
            "full",
            size=size,
            seed=seed,
            **rollouts,
        )
        self.design = design
        check_length(self.settings.frames, config.chunk, design.budgets)
        for budget in design.budgets:
            policy = design.policy(budget, by_scorer=True)
            policy.check(geometry, config.chunk, self.settings.frames)
        if design.foreign and is_first():
            warnings.warn(design.foreign, stacklevel=2)

    @cached_property
    def meter(self) -> ScorerMeter:
        """Measures a clip."""
        return self.metered(ScorerMeter, design=self.design)

    def describe(self) -> dict[str, Any]:
        """Everything that a record depends on beside its clip: part of a run's fingerprint."""
        return super().describe() | {"design": self.design.describe()}

    def check_data(self, data: Any) -> None:
        """Refuse prompts that can show nothing, and videos.

        Raises:
            ValueError: They are too few, videos, or as in the base.
        """
        if infos := getattr(data, "video_infos", None):
            raise ValueError(
                f"A scorer is judged on clips that the model makes, and "
                f"{several(len(infos), 'video')} were given. Give prompts."
            )
        super().check_data(data)
        if data.total < (least := fewest_prompts(len(self.design.budgets))):
            raise ValueError(
                f"Too few prompts: on {data.total} no test at "
                f"{several(len(self.design.budgets), 'budget')} can show anything, however large "
                f"the effect. Give {least} or more."
            )

    def setup(self, stage: str) -> None:
        """Check the data, and say which prompts the scorer was fitted on."""
        super().setup(stage)
        keys = {sample.key for sample in self.trainer.datamodule.prompt_samples()}
        for source in filter(None, (self.design.source, self.design.linear)):
            warn_taught(source, keys)


def check_sampler(model: VideoModel) -> None:
    """Refuse a model whose chunks cannot be made again on their own.

    Raises:
        ValueError: It has another sampler than the few-step one.
    """
    if (own := model.network.config.sampler) != "few-step":
        raise ValueError(
            f"Chunks of {model.name!r} cannot be made again on their own: its sampler is {own!r}. "
            "Judge whole rollouts of it (prove budgets --run), or use a few-step model."
        )


def check_length(frames: int, chunk: int, budgets: Sequence[int]) -> None:
    """Refuse clips in which nothing that is dropped could be missed.

    Args:
        frames: Of a clip.
        chunk: Frames of a chunk.
        budgets: History frames of each head.

    Raises:
        ValueError: They are too short for some budget.
    """
    least = (-(-max(budgets) // chunk) + 2) * chunk  # one chunk too many, and one that looks back
    if frames < least:
        raise ValueError(
            f"Clips of {frames} frames are too short for memories of {max(budgets)}f: nothing that "
            f"is dropped could be missed. Give --frames {least} or more, or smaller --means."
        )


def check_prompts(count: int, rules: Collection[str]) -> None:
    """Refuse fewer prompts than could show anything.

    Args:
        count: Number of held-out prompts.
        rules: Rules that are compared.

    Raises:
        ValueError: They are too few.
    """
    least = fewest_prompts(len([name for name in FAMILY if name in rules]))
    if count < least:
        planned = prompts_planned(SPREAD, WORTH)
        raise ValueError(
            f"Too few prompts: on {count} no test can show anything, however large the effect. "
            f"Give {least} or more; to see a loss lower by {WORTH:.0%}, about {planned} if "
            f"log-ratios spread by {SPREAD} between prompts."
        )
