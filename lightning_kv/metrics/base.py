"""The contract of every metric of a clip: a per-frame curve, and sums that merge by addition."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from lightning_kv.metrics.panorama import Scene


@dataclass(frozen=True)
class Clip:
    """Everything a metric may look at: one rollout, what it is compared with, and its world.

    Args:
        latents: ``[F, C, h, w]``.
        pixels: ``[P, 3, H, W]`` in [0, 1]: one for each latent frame, or one for the first and
            equally many for each of the others; None where only latents are known.
        reference_latents: The same of the reference rollout; None where there is none.
        reference_pixels: The same of the reference rollout; None where there is none.
        context: Number of leading frames that were given and not generated.
        scene: What is known about the world; None outside the panorama.

    Raises:
        ValueError: The parts differ in length, the context does not fit, or a value is not finite.
    """

    latents: Tensor
    pixels: Tensor | None = None
    reference_latents: Tensor | None = None
    reference_pixels: Tensor | None = None
    context: int = 0
    scene: Scene | None = None

    def __post_init__(self) -> None:
        names = ("latents", "pixels", "reference_latents", "reference_pixels")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        lengths = {name: len(tensor) for name, tensor in given.items()}
        shown = {name: lengths[name] for name in given if name.endswith("pixels")}
        if len(set(shown.values())) == 1 and _shows(self.frames, *set(shown.values())):
            lengths |= dict.fromkeys(shown, self.frames)
        if self.scene is not None and self.scene.positions is not None:
            lengths["scene.positions"] = len(self.scene.positions)
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"The parts of a clip differ in length: {lengths} frames. "
                "Pass the same number of frames in all of them."
            )
        if not 0 <= self.context <= self.frames:
            raise ValueError(
                f"The context does not fit the clip: {self.context} of {self.frames} frames. "
                f"Pass a number of frames from 0 to {self.frames}."
            )
        # A NaN would look like a frame that does not count, and a broken rollout like a good one.
        broken = [name for name, tensor in given.items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(
                f"A clip must be finite, but there are NaN or infinite values in {broken}. "
                "Record this rollout as failed instead of measuring it."
            )

    @property
    def frames(self) -> int:
        """Number F of latent frames, context included."""
        return len(self.latents)

    def per_frame(self, values: Tensor) -> Tensor:
        """Values of pixel frames ``[P]`` as means of the latent frames that show them, ``[F]``."""
        if len(values) == self.frames:
            return values
        later = values[1:].view(self.frames - 1, -1).mean(1)
        return torch.cat([values[:1], later])


def _shows(frames: int, pixel_frames: int) -> bool:
    """Whether so many latent frames can be shown by so many pixel frames."""
    if frames == 1:
        return pixel_frames == 1
    return pixel_frames >= frames and (pixel_frames - 1) % (frames - 1) == 0


class ClipMetric(Metric):
    """A metric that takes one clip per update and has a value for each of its frames.

    A clip's value is the mean over the frames that count; the metric is the mean over clips that
    have a value, NaN if there is none. The states are float64 sums, so ranks and shards with
    uneven numbers of clips merge by addition.

    A subclass sets the class attributes and writes :meth:`frame_values`:

    * ``name``: key in results.
    * ``unit``: unit of the value; empty for a dimensionless index.
    * ``higher_is_better``: which way is good.
    * ``recipe``: one exact sentence; values of different recipes must not be compared.
    * ``needs``: fields of :class:`Clip` that must be given.

    Example:
        >>> class Brightness(ClipMetric):
        ...     name, unit, higher_is_better = "brightness", "", True
        ...     recipe = "mean of all values, mean over frames, range [0, 1]"
        ...
        ...     def frame_values(self, clip):
        ...         return clip.pixels.double().mean((1, 2, 3))
        >>> metric = Brightness()
        >>> for level in (0.25, 0.75):
        ...     frames = torch.full((3, 3, 8, 8), level)
        ...     metric.update(Clip(latents=torch.zeros(3, 4, 1, 1), pixels=frames, context=1))
        >>> metric.compute().item()
        0.5
    """

    full_state_update = False
    is_differentiable = False

    name: str
    unit: str
    recipe: str
    needs: tuple[str, ...] = ()

    total: Tensor
    clips: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("clips", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def frame_values(self, clip: Clip) -> Tensor:
        """Value of every frame, float64 ``[F]``; NaN where it has none. Context is cut later."""

    def curve(self, clip: Clip) -> Tensor:
        """Value of every frame, float64 ``[F]``; NaN in frames that do not count.

        The frames of the context never count: they are given, so they are right by construction.

        Raises:
            ValueError: The clip lacks something this metric needs.
        """
        missing = [name for name in self.needs if getattr(clip, name) is None]
        if missing:
            raise ValueError(
                f"The metric '{self.name}' cannot be computed: the clip was given without "
                f"{', '.join(missing)}. Pass {', '.join(self.needs)}, or leave the metric out."
            )
        values = self.frame_values(clip)
        index = torch.arange(clip.frames, device=values.device)
        return values.masked_fill(index < clip.context, torch.nan)

    def update(self, clip: Clip, curve: Tensor | None = None) -> None:
        """Add one clip; one in which no frame counts changes nothing.

        Args:
            clip: The clip.
            curve: What :meth:`curve` says of it, where that is known already.
        """
        value = clip_value(self.curve(clip) if curve is None else curve)
        if value is not None:
            self.total += value
            self.clips += 1

    def compute(self) -> Tensor:
        """Mean over clips, a float64 scalar; NaN if no clip had a value."""
        return self.total / self.clips


def clip_value(curve: Tensor) -> float | None:
    """Mean over the frames that count, or None if there is none.

    Args:
        curve: ``[F]``, NaN in frames that do not count.

    Example:
        >>> clip_value(torch.tensor([float("nan"), 1.0, 2.0]))
        1.5
        >>> clip_value(torch.tensor([float("nan")])) is None
        True
    """
    counted = curve[~curve.isnan()]
    return counted.mean().item() if len(counted) else None
