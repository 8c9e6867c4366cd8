"""The contract of every metric of two sets of clips: what is kept of a set, and what is said."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_kv.metrics.backbones import Backbone
from lightning_kv.metrics.backbones import backbone as resolve
from lightning_kv.metrics.functional.moments import Moments, check_widths
from lightning_kv.metrics.inputs import (
    Labels,
    Videos,
    bootstrapped,
    clips_of,
    numbered,
)
from lightning_kv.metrics.saved import SavedMetric
from lightning_kv.metrics.set_clips import as_rows, in_order, numbered_units, rows_of
from lightning_kv.metrics.set_result import SetResult
from lightning_kv.metrics.windows import FRAMES, WindowEncoder

SIDES = ("generated", "real")
"""Names of the two sets, by ``update``'s ``real``."""

LABELS = ("windows", "ids", "units")
"""What is kept of every clip: how many windows it has, and what it was called."""


@dataclass(frozen=True)
class _Side:
    """One set: its features in their order, or its moments, and the unit of each row."""

    features: Tensor | Moments
    units: Tensor
    clips: int
    number: int


class SetMetric(SavedMetric):
    """A metric of two sets of clips, the generated ones and the real ones.

    A set is kept as the features of the windows of its clips. Clips are put in the order of their
    ids, those without one in that of their features, and an id that comes twice (from a sampler
    that pads) counts once; so the result does not depend on how the clips were spread over
    processes. Clips of one unit (the rollouts of a prompt), and the windows of a clip, are alike:
    they are split and left out together, and count as one where it matters how many are
    independent. Or a set is kept as its moments, float64 sums whose size does not grow; then each
    id may come once, and there is no standard error.

    States are saved with ``state_dict``, and sets from several jobs are put together with
    ``merge_state``. The backbone moves with the metric, is not saved with it, and is shared and not
    copied where the metric is copied.

    A subclass sets ``name`` and writes :attr:`recipe`, :meth:`value`, :meth:`null`, :meth:`error`.

    Args:
        backbone: Name of a network, or a module that maps clips ``[B, T, 3, H, W]`` in [0, 1] (then
            it has an attribute ``clip_len``, which is T) or frames ``[N, 3, H, W]`` to features
            ``[B, d]``; such as ``backbones.videomae.VideoTransformer.load(FOLDER)``. None where
            features are given.
        num_features: Width d of the features, where there is no backbone.
        features_name: What the features are called, where there is no backbone.
        features_recipe: How they were made, in a sentence; that of the backbone where None.
        keep_features: Whether to keep features, or moments.
        frames: Number of frames of a window: what the backbone takes, or 16 of one that takes
            single frames.
        reset_real_features: Whether ``reset`` forgets the real clips too, which are often the same
            for many policies.
        given: Where the weights of a backbone lie; by default they are looked for.
        accept: Licences accepted for weights that forbid commercial use.
        kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: Neither a backbone nor a number of features is given, or both; or the backbone
            takes clips of another length.
        WeightsUnavailable: Weights, a licence or a package is missing.
    """

    higher_is_better = False
    unit = ""
    tests_difference = False  # whether ``delta_frechet`` tests differences of it
    backbone: Backbone | None

    def __init__(
        self,
        backbone: str | Path | nn.Module | None = None,
        *,
        num_features: int | None = None,
        features_name: str = "given",
        features_recipe: str | None = None,
        keep_features: bool = True,
        frames: int | None = None,
        reset_real_features: bool = True,
        given: Path | str | None = None,
        accept: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (backbone is None) == (num_features is None):
            raise ValueError(
                f"Where do features come from? backbone={backbone}, num_features={num_features}. "
                "Pass a backbone, or the number of features that update_features will be given."
            )
        self.backbone = None if backbone is None else resolve(backbone, given, accept)
        self.num_features = num_features if backbone is None else self.backbone.num_features
        self.keep_features, self.reset_real_features = keep_features, reset_real_features
        self.frames = self._window(frames)
        own = "made elsewhere" if backbone is None else self.encoder.recipe
        self.features_recipe = own if features_recipe is None else features_recipe
        self.features_name = features_name if backbone is None else self.encoder.name
        for side in SIDES:
            for name, empty in self._empty().items():
                listed = name in (*LABELS, "features")
                self.add_state(
                    f"{name}_{side}",
                    [] if listed else empty,
                    dist_reduce_fx="cat" if listed else "sum",
                    persistent=True,
                )

    def looking(self, backbone: Backbone | None = None, **given: Any) -> SetMetric:
        """The same metric without clips, on another backbone or on given features.

        Args:
            backbone: As for the class; None where features are given.
            given: ``num_features``, ``features_name``, ``frames`` and ``sync_on_compute``.
        """
        other = self.clone()
        Metric.reset(other)
        other.backbone = backbone
        for name, value in given.items():
            setattr(other, name, value)
        if backbone is not None:
            other.num_features, other.features_name = backbone.num_features, other.encoder.name
        return other

    @property
    def encoder(self) -> WindowEncoder:
        """What the windows of clips are shown to, where there is a backbone."""
        return WindowEncoder(self.backbone, self.frames)

    def _window(self, frames: int | None) -> int:
        taken = None if self.backbone is None else self.backbone.clip_len
        if frames is not None and (frames < 1 or taken not in (None, frames)):
            raise ValueError(
                f"A window cannot have {frames} frames: "
                + (f"'{self.backbone.name}' takes clips of {taken}. " if taken else "")
                + f"Pass frames={taken or FRAMES}, or leave it out."
            )
        return frames or taken or FRAMES

    @property
    @abstractmethod
    def recipe(self) -> str:
        """One exact sentence; values of different recipes must not be compared."""

    @property
    def features(self) -> str:
        """What is compared, as part of the recipe."""
        name = self.features_name if self.backbone is None else self.backbone.name
        return f"{name} features of clips of {self.frames} frames ({self.features_recipe})"

    @abstractmethod
    def value(self, generated: Tensor | Moments, real: Tensor | Moments) -> Tensor:
        """Distance of two sets, both features or both moments."""

    @abstractmethod
    def null(self, real: Tensor | Moments, n: int, units: Tensor) -> float | None:
        """Distance to be expected of n units; ``units`` are those of the real rows."""

    @abstractmethod
    def error(self, generated: Tensor, real: Tensor, units: Tensor) -> float | None:
        """Standard error of the value over the units of the generated rows."""

    def status(self, n: int, n_real: int) -> str:
        """What to beware of with so many units."""
        return "ok"

    def update(
        self, videos: Videos, real: bool, *, ids: Labels = None, units: Labels = None
    ) -> None:
        """Add a batch of videos to one of the sets.

        Args:
            videos: ``[B, T, 3, H, W]``, uint8 or float in [0, 1]; or a list of ``[T, 3, H, W]`` of
                any lengths. Each is cut into consecutive windows without overlap; the frames that
                are left at its end are too few for a window and have no feature.
            real: Whether they belong to the real set.
            ids: What tells the videos of a set apart: int64 ``[B]``, or one text or number per
                video. One that comes twice counts once; without ids all count.
            units: What videos that are no independent samples have in common, such as their prompt,
                in the same form; by default each counts alone.

        Raises:
            ValueError: Shapes, types or range are wrong, a video is shorter than a window, ``real``
                is no bool, or a BootStrapper is calling.
        """
        self._check_call(real)
        if self.backbone is None:
            raise ValueError(
                f"'{self.name}' was given videos, but has no backbone. Pass one to the metric, or "
                "features [clips, d] to update_features."
            )
        clips = clips_of("videos", videos, self.device)
        self._keep([self._cut(*clip) for clip in enumerate(clips)], real, ids, units)

    def update_features(
        self,
        features: Tensor | Sequence[Tensor],
        real: bool,
        *,
        ids: Labels = None,
        units: Labels = None,
    ) -> None:
        """Add the features of a batch of clips to one of the sets.

        Args:
            features: ``[B, d]``, one row for each clip; or a list of ``[windows, d]``, one for each
                clip. Float32 or narrower.
            real: As in :meth:`update`.
            ids: As in :meth:`update`.
            units: As in :meth:`update`.

        Raises:
            ValueError: As :meth:`update`.
        """
        self._check_call(real)
        self._filled()
        self._keep(rows_of(features), real, ids, units)

    def _cut(self, place: int, clip: Tensor) -> Tensor:
        if len(clip) < self.frames:
            raise ValueError(
                f"A video is shorter than a window: number {place} has {len(clip)} frames, and "
                f"'{self.name}/{self.features_name}' looks at {self.frames}. Pass longer videos, "
                "or leave this one out."
            )
        windows = self.encoder.windows()
        windows.add(clip)
        return as_rows(windows.features())

    def _keep(self, clips: Sequence[Tensor], real: bool, ids: Labels, units: Labels) -> None:
        """Add features of clips, ``[windows, d]`` each."""
        for rows in clips:
            check_widths(rows.shape[1], self.num_features)
        numbers = numbered("ids", ids, len(clips)), numbered("units", units, len(clips))
        rows = [rows.to(self.device) for rows in (*clips, torch.zeros(0, self.num_features))]
        rows = torch.cat(rows)
        batch = {
            name: torch.tensor(column, dtype=torch.int64, device=self.device)
            for name, column in zip(LABELS, ([*map(len, clips)], *numbers), strict=True)
        }
        batch |= {"features": rows} if self.keep_features else vars(Moments.of(rows))
        for name, value in batch.items():
            state = f"{name}_{SIDES[real]}"
            listed = isinstance(getattr(self, state), list)
            more = [value] if listed else torch.as_tensor(value, device=self.device)
            setattr(self, state, getattr(self, state) + more)

    def _check_call(self, real: Any) -> None:
        if bootstrapped():
            raise ValueError(
                f"A BootStrapper cannot resample '{self.name}': a clip that is drawn twice lifts a "
                "distance of sets beyond its own interval. Use report(), whose standard_error "
                "leaves out whole units."
            )
        if not isinstance(real, bool):
            given = f"a tensor {tuple(real.shape)}" if isinstance(real, Tensor) else repr(real)
            raise ValueError(
                f"'{self.name}' compares two sets of clips, and must know which one these belong "
                f"to: real is {given}. Call update(videos, real=False) with generated clips and "
                "update(videos, real=True) with those they are compared with; in a collection of "
                "its own, not beside metrics of (preds, target)."
            )

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: A set has fewer than 2 clips, or an id came twice that must not.
        """
        return self.value(*(self._set(side).features for side in SIDES))

    def report(self) -> SetResult:
        """The distance with all that is needed to believe it; to be called on every process.

        Raises:
            ValueError: As :meth:`compute`.
        """
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync):
            own, real = map(self._set, SIDES)
        error = self.error(own.features, real.features, own.units) if self.keep_features else None
        return SetResult(
            name=f"{self.name}/{self.features_name}",
            value=self.value(own.features, real.features).item(),
            null=self.null(real.features, own.number, real.units),
            standard_error=error,
            n=own.clips,
            n_real=real.clips,
            units=own.number,
            units_real=real.number,
            windows=len(own.units),
            windows_real=len(real.units),
            recipe=self.recipe,
            status=self.status(own.number, real.number),
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

    def reset(self) -> None:
        """Forget the clips; the real ones too, unless the metric was told to keep them."""
        names = [] if self.reset_real_features else [f"{name}_real" for name in self._empty()]
        states = {name: getattr(self, name) for name in names}
        kept = {name: s[:] if isinstance(s, list) else s for name, s in states.items()}
        super().reset()
        for name, state in kept.items():
            setattr(self, name, state)

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
        none = torch.zeros(0, self.num_features, dtype=torch.float32)
        kept = {"features": none} if self.keep_features else vars(Moments.of(none))
        kept = {name: torch.as_tensor(state) for name, state in kept.items()}
        return {name: torch.zeros(0, dtype=torch.int64) for name in LABELS} | kept

    def _set(self, side: str) -> _Side:
        """One set, its clips in order, each once.

        Raises:
            ValueError: There are fewer than 2 clips, or an id came twice that must not.
        """
        states = {}
        for name, empty in self._empty().items():
            state = getattr(self, f"{name}_{side}")
            if isinstance(state, list):
                state = torch.cat([empty.to(state[0].device if state else self.device), *state])
            states[name] = state
        counts, ids, units = (states.pop(name).tolist() for name in LABELS)
        parts = states["features"].split(counts) if self.keep_features else None
        order = in_order(self.name, ids, units, parts)
        if len(order) < 2:
            raise ValueError(
                f"The metric '{self.name}' has {len(order)} {side} clips. Add 2 or more with "
                f"update(videos, real={side == SIDES[1]})."
            )
        number = numbered_units([units[place] for place in order])
        windows = torch.tensor([counts[place] for place in order])
        rows = torch.tensor(number).repeat_interleave(windows)
        if parts is None:
            features = Moments(states.pop("n").item(), **states)
        else:
            features = torch.cat([parts[place] for place in order])
        return _Side(features, rows, len(order), len(set(number)))
