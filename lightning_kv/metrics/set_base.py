"""The contract of every metric of two sets of clips: what is kept of a set, and what is said."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_kv.metrics.moments import Moments, as_features, check_widths

SIDES = ("generated", "real")
"""Names of the two sets, by ``update``'s ``real``."""

SAME = 1e-3
"""Share of its length by which a clip's features may differ when it is measured again."""


@dataclass(frozen=True)
class SetResult:
    """What a metric of sets says, with what is needed to believe it.

    Args:
        name: Metric and backbone, such as ``fvd/i3d-k400``.
        value: The distance.
        null: The distance to be expected if both sets came from one population; None where that
            cannot be told.
        standard_error: By the jackknife over the prompts of the generated clips; None where that
            cannot be told.
        n: Number of generated clips.
        n_real: Number of real clips.
        prompts: Number of prompts of the generated clips: so many count as independent.
        prompts_real: The same of the real ones.
        recipe: How it was computed; see :func:`check_comparable`.
        status: "ok", or what to beware of.
    """

    name: str
    value: float
    null: float | None
    standard_error: float | None
    n: int
    n_real: int
    prompts: int
    prompts_real: int
    recipe: str
    status: str


def check_comparable(*results: SetResult) -> None:
    """Refuse to compare results of different recipes.

    Raises:
        ValueError: The recipes differ.

    Example:
        >>> some = SetResult("fvd/x", 1.0, 2.0, 0.1, 8, 8, 8, 8, "clips of 16 frames", "ok")
        >>> check_comparable(some, some)
    """
    recipes = dict.fromkeys(result.recipe for result in results)
    if len(recipes) > 1:
        raise ValueError(
            f"Results of different recipes cannot be compared: {'; '.join(recipes)}. "
            "Compute all of them with the same one."
        )


def windows_recipe(backbone: nn.Module) -> str:
    """How the features of the windows of clips are made, in a sentence.

    Args:
        backbone: As in :class:`SetMetric`; one whose ``clip_len`` is None sees single frames.
    """
    mean = "" if backbone.clip_len else ", mean over the frames of a window"
    return (
        f"{backbone.recipe}{mean}; consecutive windows without overlap, context and remainder left "
        "out, pooled over clips"
    )


class SetMetric(Metric):
    """A metric of two sets of clips, the generated ones and the real ones.

    A set is kept as the features of its clips. They are put in the order of the ids, and an id that
    comes twice (from a sampler that pads) counts once; so the result does not depend on how the
    clips were spread over processes. Clips of one group (the windows of a rollout, or the rollouts
    of a prompt) are alike: they are split and left out together, and count as one where it matters
    how many are independent. Or a set is kept as its moments, float64 sums whose size does not
    grow; then each id may come once, and there is no standard error.

    States are saved with ``state_dict``, and sets from several jobs are put together with
    ``merge_state``. The backbone stays the caller's: it is neither moved nor saved with the metric.

    A subclass sets ``name`` and writes :attr:`recipe`, :meth:`value`, :meth:`null`, :meth:`error`.

    Args:
        backbone: Maps clips ``[B, T, 3, H, W]`` in [0, 1] to features ``[B, d]``; has attributes
            ``name``, ``num_features`` and ``recipe``. None where features are given.
        num_features: Width d of the features, where there is no backbone.
        features_name: What the features are called, where there is no backbone.
        features_recipe: How they were made, in a sentence; that of the backbone where None.
        keep_features: Whether to keep features, or moments.
        frames: Number of frames of each clip; other clips are refused.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: Neither a backbone nor a number of features is given, or both.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    name: str
    unit = ""
    tests_difference = False  # whether ``delta_frechet`` tests differences of it

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        num_features: int | None = None,
        features_name: str = "given",
        features_recipe: str | None = None,
        keep_features: bool = True,
        frames: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (backbone is None) == (num_features is None):
            raise ValueError(
                f"Where do features come from? backbone={backbone}, num_features={num_features}. "
                "Pass a backbone, or the number of features that update_features will be given."
            )
        self._backbone = (backbone,)  # in a tuple it is no submodule
        self.features_name = features_name if backbone is None else backbone.name
        if features_recipe is None:
            features_recipe = "made elsewhere" if backbone is None else backbone.recipe
        self.features_recipe = features_recipe
        self.num_features = num_features if backbone is None else backbone.num_features
        self.keep_features, self.frames = keep_features, frames
        for side in SIDES:
            for name, empty in self._empty().items():
                listed = name in ("ids", "groups", "features")
                self.add_state(
                    f"{name}_{side}",
                    [] if listed else empty,
                    dist_reduce_fx="cat" if listed else "sum",
                    persistent=True,
                )

    @property
    @abstractmethod
    def recipe(self) -> str:
        """One exact sentence; values of different recipes must not be compared."""

    @property
    def features(self) -> str:
        """What is compared, as part of the recipe."""
        return (
            f"{self.features_name} features of clips of {self.frames} frames "
            f"({self.features_recipe})"
        )

    @abstractmethod
    def value(self, generated: Tensor | Moments, real: Tensor | Moments) -> Tensor:
        """Distance of two sets, both features or both moments."""

    @abstractmethod
    def null(self, real: Tensor | Moments, prompts: int, groups: Tensor) -> float | None:
        """Distance to be expected of so many prompts; groups are those of the real clips."""

    @abstractmethod
    def error(self, generated: Tensor, real: Tensor, groups: Tensor) -> float | None:
        """Standard error of the value over the groups of the generated clips."""

    def status(self, prompts: int, prompts_real: int) -> str:
        """What to beware of with so many prompts."""
        return "ok"

    def update(self, clips: Tensor, real: bool, ids: Tensor, groups: Tensor | None = None) -> None:
        """Add a batch of clips to one of the sets.

        Args:
            clips: ``[B, T, 3, H, W]`` in [0, 1], on the device of the backbone; or their features,
                as in :meth:`update_features`.
            real: Whether they belong to the real set.
            ids: What tells the clips of a set apart, int64 ``[B]``.
            groups: What clips that are no independent samples have in common, such as the number
                of their prompt, int64 ``[B]``; by default each clip stands alone.

        Raises:
            ValueError: Shapes, types or range are wrong, or features are not finite.
        """
        features = self._embed(clips) if clips.ndim == 5 else clips
        if features.dtype == torch.float64:
            raise ValueError(
                "Features are kept in float32, but these are float64. Pass features.float()."
            )
        check_widths(as_features(features, least=1).shape[1], self.num_features)
        names = {"ids": ids, "groups": ids if groups is None else groups}
        for what, given in names.items():
            if given.shape != (len(features),) or given.dtype != torch.int64:
                raise ValueError(
                    f"The {what} do not fit {len(features)} clips: {given.dtype} "
                    f"{tuple(given.shape)}. Pass one int64 for each clip."
                )
        features = features.detach().float().to(self.device)
        batch = {"features": features} if self.keep_features else vars(Moments.of(features))
        for name, value in (names | batch).items():
            state = f"{name}_{SIDES[real]}"
            more = [value.to(self.device)] if isinstance(getattr(self, state), list) else value
            setattr(self, state, getattr(self, state) + more)

    def update_features(
        self, features: Tensor, real: bool, ids: Tensor, groups: Tensor | None = None
    ) -> None:
        """Add the features of a batch of clips to one of the sets.

        Args:
            features: ``[B, d]``, float32 or narrower.
            real: As in :meth:`update`.
            ids: As in :meth:`update`.
            groups: As in :meth:`update`.

        Raises:
            ValueError: As :meth:`update`.
        """
        self.update(features, real, ids, groups)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: A set has fewer than 2 clips, or an id came twice that must not.
        """
        return self.value(self._set("generated")[0], self._set("real")[0])

    def report(self) -> SetResult:
        """The distance with all that is needed to believe it; to be called on every process.

        Raises:
            ValueError: As :meth:`compute`.
        """
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync):
            (generated, groups), (real, real_groups) = map(self._set, SIDES)
        prompts, prompts_real = len(groups.unique()), len(real_groups.unique())
        return SetResult(
            name=f"{self.name}/{self.features_name}",
            value=self.value(generated, real).item(),
            null=self.null(real, prompts, real_groups),
            standard_error=self.error(generated, real, groups) if self.keep_features else None,
            n=len(groups),
            n_real=len(real_groups),
            prompts=prompts,
            prompts_real=prompts_real,
            recipe=self.recipe,
            status=self.status(prompts, prompts_real),
        )

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Refuse the value of one batch.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"One batch has no '{self.name}': it is a distance of whole sets. Call update for each "
            "batch, and compute at the end."
        )

    def reset(self, reset_real: bool = True) -> None:
        """Forget the clips.

        Args:
            reset_real: Whether to forget the real ones too, which are often the same for many
                policies.
        """
        names = [] if reset_real else [f"{name}_real" for name in self._empty()]
        states = {name: getattr(self, name) for name in names}
        kept = {name: s[:] if isinstance(s, list) else s for name, s in states.items()}
        super().reset()
        for name, state in kept.items():
            setattr(self, name, state)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the clips of another metric of the same recipe.

        Args:
            incoming_state: That metric, or its ``metric_state``.

        Raises:
            ValueError: The recipes differ.
        """
        if isinstance(incoming_state, SetMetric):
            self._refuse_recipe(incoming_state.recipe)
        super().merge_state(incoming_state)
        self._filled()

    def get_extra_state(self) -> dict[str, str]:
        """What ``state_dict`` holds beside the sets."""
        return {"recipe": self.recipe}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Check what ``load_state_dict`` brings; a metric of another recipe is left empty."""
        try:
            self._refuse_recipe(state["recipe"])
        except ValueError:
            self.reset()
            raise
        self._filled()

    def _filled(self) -> None:
        """Clips came by another way than ``update``: no value is known, and no warning is due."""
        self._computed = None
        self._update_count += 1

    def _refuse_recipe(self, recipe: str) -> None:
        if recipe != self.recipe:
            raise ValueError(
                f"Clips of '{recipe}' cannot be counted by '{self.recipe}'. Make both metrics with "
                "the same arguments."
            )

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A process without clips must gather what the others gather: same type, same axes.
        for side in SIDES:
            for name, empty in self._empty().items():
                state = getattr(self, f"{name}_{side}")
                if isinstance(state, list) and not state:
                    state.append(empty.to(self.device))
        super()._sync_dist(*args, **kwargs)

    def _empty(self) -> dict[str, Tensor]:
        """States of an empty set."""
        ids, none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.num_features)
        kept = {"features": none} if self.keep_features else vars(Moments.of(none))
        kept = {name: torch.as_tensor(state) for name, state in kept.items()}
        return {"ids": ids, "groups": ids.clone()} | kept

    def _set(self, side: str) -> tuple[Tensor | Moments, Tensor]:
        """One set: its features in the order of the ids, each once, or its moments; its groups."""
        states = {}
        for name, empty in self._empty().items():
            state = getattr(self, f"{name}_{side}")
            states[name] = (
                torch.cat([empty.to(self.device), *state]) if isinstance(state, list) else state
            )
        ids, order = states.pop("ids").sort(stable=True)
        groups = states.pop("groups")[order]
        fresh = torch.ones_like(ids, dtype=torch.bool)
        fresh[1:] = ids.diff() != 0
        if fresh.sum() < 2:
            raise ValueError(
                f"The metric '{self.name}' has {fresh.sum()} {side} clips. Add 2 or more with "
                f"update(clips, real={side == SIDES[1]}, ids=...)."
            )
        if not self.keep_features:
            self._refuse_ids(ids[~fresh], "came twice, and sums cannot tell which to drop")
            return Moments(states.pop("n").item(), **states), groups
        features = states["features"][order]
        moved = (features - features.roll(1, 0)).norm(dim=1) > SAME * features.norm(dim=1)
        self._refuse_ids(ids[moved & ~fresh], "came twice with different features")
        other = groups != groups.roll(1)
        self._refuse_ids(ids[other & ~fresh], "came twice with different groups")
        return features[fresh], groups[fresh]

    def _refuse_ids(self, ids: Tensor, what: str) -> None:
        if len(ids):
            raise ValueError(
                f"{len(ids)} ids of '{self.name}' {what}, such as {ids[0]}. Give each clip its "
                "own id, and keep features where a clip may be seen again."
            )

    def _embed(self, clips: Tensor) -> Tensor:
        backbone = self._backbone[0]
        if backbone is None:
            raise ValueError(
                f"'{self.name}' was given clips {tuple(clips.shape)}, but has no backbone. Pass "
                "one to the metric, or features [B, d] to update_features."
            )
        if clips.shape[1:3] != (self.frames, 3) or not clips.is_floating_point():
            raise ValueError(
                f"These are no clips of {self.frames} frames: {clips.dtype} {tuple(clips.shape)}. "
                f"Pass floating point numbers [B, {self.frames}, 3, H, W]."
            )
        low, high = (end.item() for end in clips.aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                f"Clips must lie in [0, 1], but these go from {low:.3g} to {high:.3g}. Divide "
                "8-bit pixels by 255, or clamp what a decoder overshoots."
            )
        backbone.eval()
        return backbone(clips).reshape(len(clips), -1)  # some drop the axis of a single clip
