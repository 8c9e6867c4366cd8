"""How much moves, and how smoothly: metrics on optical flow and on imagined frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_kv.metrics.backbones import BACKBONES, Backbone
from lightning_kv.metrics.backbones import backbone as resolve
from lightning_kv.metrics.backbones.interpolators import LinearMidpoint
from lightning_kv.metrics.base import Reader
from lightning_kv.metrics.features import FeatureMetric
from lightning_kv.metrics.functional.dynamics import (
    RATE,
    SIDE,
    is_dynamic,
    likeness,
    mean_motion,
    motion_score,
    sampling_interval,
)
from lightning_kv.metrics.functional.motion import checked_pixels, eight_bit


class Pairwise(Backbone):
    """Any module that takes two frames, in evaluation mode and without gradients.

    Args:
        module: Takes two frames ``[N, 3, H, W]`` in [0, 1]. Its attributes ``name`` and ``recipe``
            are taken over where it has them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.name = getattr(module, "name", type(module).__name__.lower())
        self.recipe = getattr(module, "recipe", f"module {type(module).__name__} given by the user")
        self.freeze()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """What the module says of two frames."""
        return self.module(first, second)


class PairMetric(FeatureMetric):
    """A metric that shows a network two frames at a time; results are named ``METRIC/NETWORK``.

    Args:
        backbone: A name out of ``backbones``, or a module that takes two frames ``[N, 3, H, W]``.
        given: As in :class:`~lightning_kv.metrics.features.FeatureMetric`, and so on.
    """

    through = "network"

    @classmethod
    def _fitting(
        cls, name: str | nn.Module, given: Path | str | None, accept: Collection[str]
    ) -> Backbone:
        """The network, if it fits.

        Raises:
            ValueError: It does not.
        """
        if isinstance(name, nn.Module):
            return name if isinstance(name, Backbone) else Pairwise(name)
        head = name.partition("=")[0]
        if head in (*BACKBONES, LinearMidpoint.name) and head not in cls.backbones:
            raise ValueError(
                f"The metric '{cls.name}' is not defined on '{head}'. Choose one of "
                f"{', '.join(cls.backbones)}, or pass a module that takes two frames."
            )
        return LinearMidpoint() if name == LinearMidpoint.name else resolve(name, given, accept)

    @torch.no_grad()
    def look(self, first: Tensor, second: Tensor, channels: int) -> Tensor:
        """What the network says of two frames.

        Raises:
            ValueError: It is no image of their size with so many channels.
        """
        found = self.backbone(first, second)
        wanted = (len(first), channels, *first.shape[-2:])
        if not isinstance(found, Tensor) or found.shape != wanted:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"The network '{self.backbone.name}' gave {shape} for two frames "
                f"{tuple(first.shape)}. Pass a module whose forward(first, second) gives {wanted}."
            )
        return found


class FlowMetric(PairMetric):
    """A metric on the optical flow between frames that are an eighth of a second apart.

    Every ``max(1, round(fps / 8))``-th frame is looked at, the first one included; the value of a
    step stands at its later frame, and all other frames have none. A subclass says what a flow
    is worth in :meth:`score`.
    """

    needs = ("pixels", "fps")
    backbones = ("raft-large",)

    @abstractmethod
    def score(self, flow: Tensor) -> Tensor:
        """What a flow ``[N, 2, H, W]`` in pixels is worth, float64 ``[N]``."""

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Score of the step that ends at every frame looked at.

        Raises:
            ValueError: Nobody knows the frames per second.
        """
        if fps is None:
            raise ValueError(
                f"The metric '{self.name}' cannot be computed: it looks at {RATE} frames per "
                "second, and the clip was given without fps. Pass update(preds, fps=...), or leave "
                "the metric out."
            )
        interval = sampling_interval(fps)
        last: Tensor | None = None
        shown = 0

        def read(pixels: Tensor, _: Tensor | None) -> Tensor:
            nonlocal last, shown
            values = torch.full((len(pixels),), torch.nan, dtype=torch.float64)
            for place, frame in enumerate(checked_pixels(pixels).split(1)):
                if (shown + place) % interval:
                    continue
                if last is not None:
                    # One pair at a time: a pair's correlations are much larger than its frames.
                    values[place] = self.score(self.look(last, frame, channels=2))
                last = frame.clone()
            shown += len(pixels)
            return values

        return read


class DynamicDegree(FlowMetric):
    """Share of clips that move, by VBench's rule.

    See :func:`~lightning_kv.metrics.functional.is_dynamic`.

    The curve holds the motion of each step in pixels of a frame whose shorter side has 256, so
    that the threshold is 6 for every size of frame and the curve alone says whether a clip moves.
    It applies to steps of pixel frames; where a curve holds means of the several pixel frames that
    show one latent frame, the rule is applied to those means. A higher degree is better only
    within reason: it belongs beside every score of consistency.

    Args:
        backbone: Name of a network of optical flow, or a module.
        given: As for every :class:`PairMetric`.
        accept: As for every :class:`PairMetric`.
        kwargs: As for every :class:`PairMetric`.

    Example:
        >>> class Right(nn.Module):
        ...     def forward(self, first, second):
        ...         return torch.tensor([9.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, *first.shape[-2:])
        >>> metric = DynamicDegree(Right())
        >>> metric.update(torch.zeros(1, 9, 3, 256, 256), fps=8.0)
        >>> metric.compute().item()
        1.0
    """

    name = "dynamic_degree"
    unit = "share"
    higher_is_better = True
    recipe = (
        "VBench dynamic degree on every max(1, round(fps/8))-th frame: mean of the 5 % longest "
        "flow vectors per step, 1 where at least round(4 frames/16) steps exceed 6 short side/256, "
        "else 0; mean over clips; steps after the context alone, and their means where several "
        "pixel frames show one latent frame; curve in pixels of a short side of 256"
    )
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def score(self, flow: Tensor) -> Tensor:
        """Motion of the 5 % of the pixels that move most, for a shorter side of 256."""
        return motion_score(flow) * SIDE / min(flow.shape[-2:])

    def value(self, curve: Tensor) -> float | None:
        """1 where the clip moves, 0 where it does not; None where no step counts."""
        scores = curve[~curve.isnan()]
        return float(is_dynamic(scores, SIDE)) if len(scores) else None


class FlowMagnitude(FlowMetric):
    """How far things move in an eighth of a second, without a threshold.

    See :func:`~lightning_kv.metrics.functional.mean_motion`.

    Neither way is good in itself; a cache that freezes the scene lowers it.

    Args:
        backbone: Name of a network of optical flow, or a module.
        given: As for every :class:`PairMetric`.
        accept: As for every :class:`PairMetric`.
        kwargs: As for every :class:`PairMetric`.

    Example:
        >>> class Right(nn.Module):
        ...     def forward(self, first, second):
        ...         return torch.tensor([9.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, *first.shape[-2:])
        >>> FlowMagnitude(Right()).curve(torch.zeros(5, 3, 32, 32), fps=16.0).tolist()
        [nan, nan, 9.0, nan, 9.0]
    """

    name = "flow_magnitude"
    unit = "px"
    higher_is_better = None
    recipe = (
        "mean over steps after the context of the mean length of the flow vectors, on every "
        "max(1, round(fps/8))-th frame, pixels of the original size"
    )
    plot_lower_bound = 0.0

    def score(self, flow: Tensor) -> Tensor:
        """Mean length of the vectors."""
        return mean_motion(flow)


class MotionSmoothness(PairMetric):
    """How well dropped frames can be imagined from their neighbours, by VBench's formula.

    Of frames 2k, 2k + 1, 2k + 2 the middle one is dropped and imagined again. Its value,
    (255 - mean absolute difference) / 255, stands at frame 2k + 2, where it becomes known; frames
    are rounded to 8 bits and imagined ones cut off to 8 bits, as VBench's files and code have it.
    VBench shrinks frames where the memory of its GPU is small; here they keep their size.

    Args:
        backbone: ``amt-s`` for the number of VBench; ``linear-midpoint``, which needs no weights
            and is another metric; or a module that takes two frames and gives the middle one.
        given: As for every :class:`PairMetric`.
        accept: As for every :class:`PairMetric`.
        kwargs: As for every :class:`PairMetric`.

    Example:
        >>> frames = torch.tensor([0.0, 0.4, 0.8, 0.2, 0.8]).view(5, 1, 1, 1).expand(5, 3, 8, 8)
        >>> metric = MotionSmoothness("linear-midpoint")
        >>> metric.curve(frames).round(decimals=2).tolist()
        [nan, nan, 1.0, nan, 0.4]
    """

    name = "motion_smoothness"
    unit = ""
    higher_is_better = True
    recipe = (
        "mean over triples after the context of (255 - mean |odd frame - frame imagined between "
        "its even neighbours|) / 255, frames rounded and imagined ones truncated to 8 bits, value "
        "at the later neighbour"
    )
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    backbones = ("amt-s", "linear-midpoint")

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Likeness of each odd frame to the one imagined, where the triple closes."""
        imagine = partial(self.look, channels=3)
        even: Tensor | None = None
        odd: Tensor | None = None

        def read(pixels: Tensor, _: Tensor | None) -> Tensor:
            nonlocal even, odd
            values = torch.full((len(pixels),), torch.nan, dtype=torch.float64)
            for place, frame in enumerate(eight_bit(pixels).split(1)):
                if even is not None and odd is None:
                    odd = frame.clone()
                    continue
                if odd is not None:
                    values[place] = likeness(even, odd, frame, imagine)
                even, odd = frame.clone(), None
            return values

        return read
