"""The contract of metrics of clips: how videos come in, what is kept of them, what is said.

A :class:`ClipMetric` has a curve for every clip, a value for every curve, and says the mean over
units of the mean over the clips of a unit. A :class:`VideoMetric` makes its curves from pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.metrics.inputs import (
    NOBODY,
    Labels,
    Videos,
    clips_of,
    missing_target,
    number_of,
    numbered,
    per_clip,
    refuse_resampled,
    told,
)
from lightning_kv.metrics.reading import BLOCK, Block, Reader, noting, read_clip
from lightning_kv.metrics.saved import SavedMetric
from lightning_kv.stats.bootstrap import bca_interval

__all__ = [
    "BLOCK",
    "Block",
    "ClipMetric",
    "Reader",
    "VideoMetric",
    "clip_value",
    "noting",
    "read_clip",
]

SAME = 1e-6
"""Share by which the value of a clip may differ when it is measured again."""


class ClipMetric(SavedMetric):
    """A metric that has a curve and a value for every clip.

    The metric is the mean over units of the mean over the clips of a unit: several samples of one
    prompt are one value. A clip whose id comes twice (from a sampler that pads, or a run that was
    taken up again) counts once. So the result depends neither on the number of processes nor on
    the order of clips. NaN where no clip has a value. Bounds: :meth:`interval`.

    A subclass sets the class attributes and writes ``update``:

    * ``name``: key in results; by default the class's in snake case.
    * ``unit``: unit of the value; empty for a dimensionless index.
    * ``higher_is_better``: which way is good; None where neither is.
    * ``recipe``: one exact sentence; values of different recipes must not be compared.
    * ``needs``: what it must know of a clip, such as ``pixels`` or ``latents``.
    * ``identical``: its value for a clip that equals its target, where it compares and that is one
      finite number for all clips.
    * ``plot_lower_bound``, ``plot_upper_bound``: ends of its scale, where it has any.

    Args:
        curves: Keep the curves of all clips too, for :attr:`curves`.
        prompt_table: Prompts, where ``update`` is given their indices as a tensor.
        kwargs: What every torchmetrics metric takes.
    """

    unit: str = ""
    needs: ClassVar[tuple[str, ...]] = ()
    identical: float | None = None
    undefined: str = "no frame counts"  # why a clip may have no value

    values: list[Tensor]
    ids: list[Tensor]
    units: list[Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        if cls.recipe in ("", *(f"{b.__module__}.{b.__qualname__}" for b in cls.__mro__[1:])):
            cls.recipe = f"{cls.__module__}.{cls.__qualname__}"

    def __init__(
        self,
        *,
        curves: bool = False,
        prompt_table: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.prompt_table = prompt_table
        self._keeps_curves = curves
        for name in self._listed:
            self.add_state(name, [], dist_reduce_fx="cat", persistent=True)

    @property
    def _listed(self) -> tuple[str, ...]:
        return ("values", "ids", "units", *(("frames", "points") if self._keeps_curves else ()))

    @classmethod
    def against_reference(cls) -> bool:
        """Whether it compares with a target, which then has no value of its own."""
        return any(need.startswith("reference") for need in cls.needs)

    def value(self, curve: Tensor) -> float | None:
        """What the curve of a clip comes to: its mean, unless a metric says otherwise."""
        return clip_value(curve)

    def add(
        self, curve: Tensor, *, id: int | str | None = None, unit: int | str | None = None
    ) -> float | None:
        """Add a clip whose curve is known, from a record or from :func:`read_clip`.

        Args:
            curve: ``[T]``, NaN in frames that do not count.
            id: What tells the clip apart; one that comes twice counts once.
            unit: What clips that are no independent samples have in common: their prompt.

        Returns:
            The clip's value; None, and nothing is added, where no frame counts.

        Raises:
            ValueError: An id or a unit is no text and no whole number of 64 bits.
        """
        numbers = number_of(id), number_of(unit)
        self._filled()
        return self._add(curve, *numbers)

    def _add(self, curve: Tensor, number: int, unit: int) -> float | None:
        value = self.value(curve)
        if value is not None:
            self._keep(value, curve, number, unit)
        return value

    def _keep(self, value: float, curve: Tensor, number: int, unit: int) -> None:
        place = {"device": self.device}
        self.values.append(torch.tensor([value], dtype=torch.float64, **place))
        self.ids.append(torch.tensor([number], **place))
        self.units.append(torch.tensor([unit], **place))
        if self._keeps_curves:
            self.frames.append(torch.tensor([len(curve)], **place))
            self.points.append(curve.detach().double().to(self.device))

    def _add_all(self, curves: Iterable[Tensor], ids: Labels, units: Labels, clips: int) -> None:
        """Add a batch of clips, whose labels are checked first."""
        refuse_resampled(self.name, {"ids": ids, "units": units})
        numbers = numbered("ids", ids, clips), numbered("units", units, clips)
        for curve, *number in zip(curves, *numbers, strict=True):
            self._add(curve, *number)

    def compute(self) -> Tensor:
        """Mean over units, a float64 scalar; NaN if no clip had a value.

        Raises:
            ValueError: Two clips of one id have different values.
        """
        values = self.unit_values()
        if not len(values):
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        return values.mean().to(self.device)

    def unit_values(self) -> Tensor:
        """Mean over the clips of every unit, float64 ``[units]`` on the CPU.

        Raises:
            ValueError: As :meth:`compute`.
        """
        values, units, _ = self._distinct()
        alone = units == NOBODY
        places, group = units[~alone].unique(return_inverse=True)
        sums = values.new_zeros(len(places)).index_add_(0, group, values[~alone])
        return torch.cat([values[alone], sums / group.bincount(minlength=len(places))])

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Confidence interval of the mean: a bootstrap that resamples whole units.

        To be called on every process. See :func:`lightning_kv.stats.bootstrap.bca_interval`; None
        where there are too few units for one.
        """
        with self.sync_context(self.dist_sync_fn, should_sync=self._to_sync):
            values = self.unit_values()
        return bca_interval(values.tolist(), level) if len(values) else None

    @property
    def curves(self) -> list[Tensor]:
        """Curve of every clip that has a value, float64 ``[T]`` each; of this process alone.

        Raises:
            ValueError: The metric was not made with ``curves=True``.
        """
        if not self._keeps_curves:
            raise ValueError(
                f"'{self.name}' keeps no curves: curves=False. Make it with curves=True."
            )
        order = self._distinct()[2]
        lengths = _joined(self.frames, torch.int64).tolist()
        found = _joined(self.points, torch.float64).split(lengths)
        return [found[place] for place in order.tolist()]

    def _distinct(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values and units of the clips by id, each once, and where they stand in the states."""
        values = _joined(self.values, torch.float64)
        ids, order = _joined(self.ids, torch.int64).sort(stable=True)
        fresh = torch.ones_like(ids, dtype=torch.bool)
        fresh[1:] = (ids.diff() != 0) | (ids[1:] == NOBODY)
        values = values[order]
        first = values[fresh][fresh.cumsum(0) - 1]
        moved = (values - first).abs() > SAME * (1 + first.abs())
        if moved.any():
            raise ValueError(
                f"'{self.name}' was given {int(moved.sum())} clips again with other values, such "
                f"as {values[moved][0].item():g} after {first[moved][0].item():g}. Give each clip "
                "its own id."
            )
        order = order[fresh]
        return values[fresh], _joined(self.units, torch.int64)[order], order

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A process without clips must gather what the others gather: same type, same axes.
        for name in self._listed:
            state = getattr(self, name)
            kind = torch.float64 if name in ("values", "points") else torch.int64
            if isinstance(state, list) and not state:
                state.append(torch.zeros(0, dtype=kind, device=self.device))
        super()._sync_dist(*args, **kwargs)


class VideoMetric(ClipMetric):
    """A metric of pixels, whatever the length of the videos; takes them as torchmetrics does.

    A subclass writes :meth:`frame_values`, or :meth:`reader` where a frame's value depends on the
    frames before it. One that compares with a target sets ``paired = True``; one that must know the
    prompt or the frames per second names them in ``needs``.

    Args:
        curves: As in :class:`ClipMetric`.
        prompt_table: As in :class:`ClipMetric`.
        kwargs: As in :class:`ClipMetric`.

    Example:
        >>> class Darkness(VideoMetric):
        ...     higher_is_better = False
        ...
        ...     def frame_values(self, preds, target=None):
        ...         return 1 - preds.double().mean((1, 2, 3))
        >>> metric = Darkness()
        >>> for level in (0.25, 0.75):
        ...     metric.update(torch.full((1, 5, 3, 8, 8), level))
        >>> metric.name, metric.compute().item()
        ('darkness', 0.5)
    """

    needs: ClassVar[tuple[str, ...]] = ("pixels",)
    paired: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("paired") and "needs" not in vars(cls):
            cls.needs = ("pixels", "reference_pixels")
        cls.paired = cls.against_reference()

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """Value of every frame by itself, float64 ``[f]``; NaN where it has none.

        Args:
            preds: ``[f, 3, H, W]`` in [0, 1].
            target: The same, where the metric compares.
        """
        raise NotImplementedError(f"{type(self).__name__} writes neither frame_values nor reader")

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """What reads one clip; made fresh for each.

        Args:
            prompt: What the model was told.
            fps: Frames per second.
        """
        return self.frame_values

    def curve(
        self,
        preds: Tensor,
        target: Tensor | None = None,
        *,
        prompt: str | None = None,
        fps: float | None = None,
    ) -> Tensor:
        """Value of every frame of one clip, float64 ``[T]`` on the CPU; adds nothing.

        Args:
            preds: ``[T, 3, H, W]`` in [0, 1].
            target: The same, where the metric compares.
            prompt: What the model was told.
            fps: Frames per second.

        Raises:
            ValueError: The metric cannot judge this clip.
        """
        blocks: Iterable[Block] = ((block, None) for block in preds.split(BLOCK))
        if self.against_reference():
            if target is None:
                raise missing_target(self.name, "target")
            blocks = zip(preds.split(BLOCK), target.split(BLOCK), strict=True)
        return read_clip({"": self}, blocks, prompt, fps)[""]

    def pooled(self, values: Tensor) -> Tensor:
        """Values of frames that show one latent frame, ``[n, k]``, as one value each, ``[n]``."""
        return values.nanmean(1)

    def update(
        self,
        preds: Videos,
        target: Videos | None = None,
        *,
        prompts: Labels = None,
        fps: float | Sequence[float] | Tensor | None = None,
        ids: Labels = None,
        units: Labels = None,
    ) -> None:
        """Add a batch of videos.

        Args:
            preds: ``[B, T, 3, H, W]``, uint8 or float in [0, 1]; or a list of ``[T, 3, H, W]`` of
                any lengths.
            target: What they are compared with, of the same shapes; metrics that do not compare
                leave it alone, so that they fit into one collection with those that do.
            prompts: What the model was told, one text per video; or int64 ``[B]``, places in
                ``prompt_table``, which stand for the texts there.
            fps: Frames per second, one number or one per video.
            ids: What tells the videos apart: int64 ``[B]``, or one text or number per video. One
                that comes twice counts once; without ids all count.
            units: What videos that are no independent samples have in common, in the same form; by
                default their prompt, and without prompts each counts alone.

        Raises:
            ValueError: Shapes, types, ranges or numbers do not fit, a target or a prompt is
                missing, or a BootStrapper resampled the videos and not what belongs to them.
        """
        refuse_resampled(self.name, {"prompts": prompts, "ids": ids, "units": units})
        clips = clips_of("preds", preds, self.device)
        targets: Sequence[Tensor | None] = [None] * len(clips)
        if self.against_reference():
            targets = clips_of("target", target, self.device, like=clips, of=self.name)
        needed = "prompt" in self.needs
        prompts = told(self.name, prompts, self.prompt_table, len(clips), needed)
        texts = [one if isinstance(one, str) else None for one in prompts]
        rates = per_clip("fps", fps, len(clips))
        curves = (
            self.curve(one, other, prompt=text, fps=rate)
            for one, other, text, rate in zip(clips, targets, texts, rates, strict=True)
        )
        if units is None and None not in prompts:
            units = prompts
        self._add_all(curves, ids, units, len(clips))


def clip_value(curve: Tensor) -> float | None:
    """Mean over the frames that count, or None if there is none.

    Args:
        curve: ``[T]``, NaN in frames that do not count.

    Example:
        >>> clip_value(torch.tensor([float("nan"), 1.0, 2.0]))
        1.5
        >>> clip_value(torch.tensor([float("nan")])) is None
        True
    """
    counted = curve[~curve.isnan()]
    return counted.mean().item() if len(counted) else None


def _joined(state: list[Tensor] | Tensor, kind: torch.dtype) -> Tensor:
    """A list state as one tensor on the CPU, before or after it was gathered.

    There sums have one order, and results do not differ from call to call.
    """
    parts = [state] if isinstance(state, Tensor) else state
    return torch.cat([torch.zeros(0, dtype=kind), *(part.cpu() for part in parts)])
