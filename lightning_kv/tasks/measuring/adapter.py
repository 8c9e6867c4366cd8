"""What a rollout knows beyond pixels, brought to the metrics: the one place where they meet.

Metrics take tensors, each kind its own: videos, latents, curves of a probe, latents and a world.
Here a clip is all of that, and every metric gets of it what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_kv.metrics.base import (
    BLOCK,
    Block,
    ClipMetric,
    VideoMetric,
    noting,
    read_clip,
)
from lightning_kv.metrics.latents import LatentMetric
from lightning_kv.metrics.mechanism import AttentionMetric
from lightning_kv.metrics.panorama import Scene, WorldMetric
from lightning_kv.metrics.windows import WindowEncoder


@dataclass(frozen=True)
class Clip:
    """Everything that is known of one clip: a rollout, what it is compared with, and its world.

    Args:
        latents: ``[F, C, h, w]``; None where only pixels are known.
        pixels: ``[P, 3, H, W]`` in [0, 1]: one for each latent frame, or one for the first and
            equally many for each of the others; None where only latents are known.
        reference_latents: The same of the reference rollout; None where there is none.
        reference_pixels: The same of the reference rollout; None where there is none.
        context: Number of leading frames that were given and not generated.
        scene: What is known about the world; None outside the panorama.
        prompt: What the model was told; None where nobody knows.
        fps: Pixel frames per second; None where nobody knows.
        attention: Curves ``[F]`` that a probe of the cache wrote, by name; None without a probe.

    Raises:
        ValueError: There is neither, the parts differ in length, the context does not fit, or a
            value is not finite.
    """

    latents: Tensor | None = None
    pixels: Tensor | None = None
    reference_latents: Tensor | None = None
    reference_pixels: Tensor | None = None
    context: int = 0
    scene: Scene | None = None
    prompt: str | None = None
    fps: float | None = None
    attention: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        names = ("latents", "pixels", "reference_latents", "reference_pixels")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.latents is None and self.pixels is None:
            raise ValueError(
                f"A clip without latents and without pixels shows nothing: {list(given)} were "
                "given. Pass latents, pixels, or both."
            )
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
        """Number F of latent frames (of pixel frames where there are no latents)."""
        return len(self.pixels if self.latents is None else self.latents)

    @property
    def given_pixels(self) -> int:
        """Number of leading pixel frames that show the context."""
        if not self.context or self.pixels is None:
            return 0
        if self.frames == 1:
            return 1
        return 1 + (self.context - 1) * (len(self.pixels) - 1) // (self.frames - 1)

    def blocks(self) -> Iterator[Block]:
        """Pixels of this clip and of the reference, a few frames at a time."""
        if self.reference_pixels is None:
            yield from ((block, None) for block in self.pixels.split(BLOCK))
        else:
            yield from zip(
                self.pixels.split(BLOCK), self.reference_pixels.split(BLOCK), strict=True
            )


def _shows(frames: int, pixel_frames: int) -> bool:
    """Whether so many latent frames can be shown by so many pixel frames."""
    if frames == 1:
        return pixel_frames == 1
    return pixel_frames >= frames and (pixel_frames - 1) % (frames - 1) == 0


@dataclass
class Measured:
    """What was measured of one clip.

    Args:
        values: By metric; None where it has none.
        curves: Value of every frame by metric, float64 ``[F]``, NaN in frames that do not count.
        features: Of its windows, float32 ``[windows, d]``, by the name of an encoder.
        problems: Why a metric cannot judge this clip, by name.
    """

    values: dict[str, float | None]
    curves: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def measure(
    metrics: Mapping[str, ClipMetric],
    clip: Clip,
    encoders: Mapping[str, WindowEncoder] | None = None,
) -> Measured:
    """Value and curve of every metric that can judge a clip, and features of its windows.

    Pixels go by once, for all metrics and encoders together. Given frames never count: they are
    right by construction.

    Args:
        metrics: By name; nothing is added to them. One that needs what the clip lacks has no value.
        clip: The clip.
        encoders: What metrics of sets look through, by name.
    """
    able = {name: each for name, each in metrics.items() if _judges(each, clip)}
    found = Measured(dict.fromkeys(metrics))
    for name, curve in _curves(able, clip, found.problems).items():
        curve = curve.masked_fill(torch.arange(len(curve)) < clip.context, torch.nan)
        found.curves[name], found.values[name] = curve, able[name].value(curve)
    if clip.pixels is not None:
        found.features = features(clip.pixels, encoders or {}, clip.given_pixels, found.problems)
    return found


def features(
    pixels: Tensor,
    encoders: Mapping[str, WindowEncoder],
    given: int = 0,
    problems: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Features of the windows of a clip ``[P, 3, H, W]``, by the name of an encoder."""
    found = {}
    for name, encoder in encoders.items():
        with noting(problems, name):
            windows = encoder.windows(given)
            windows.add(pixels)
            found[name] = windows.features()
    return found


def _judges(metric: ClipMetric, clip: Clip) -> bool:
    return all(getattr(clip, need) is not None for need in metric.needs)


def _curves(
    metrics: Mapping[str, ClipMetric], clip: Clip, problems: dict[str, str]
) -> dict[str, Tensor]:
    """Curves by latent frame, on the CPU."""
    of_pixels = {n: each for n, each in metrics.items() if isinstance(each, VideoMetric)}
    found = {}
    if of_pixels:
        shown = read_clip(of_pixels, clip.blocks(), clip.prompt, clip.fps, problems)
        found = {name: per_frame(of_pixels[name], curve, clip) for name, curve in shown.items()}
    for name, metric in metrics.items():
        if name not in of_pixels:
            with noting(problems, name):
                found[name] = _looks(metric)(clip).double().cpu()
    return {name: found[name] for name in metrics if name in found}


def per_frame(metric: VideoMetric, values: Tensor, clip: Clip) -> Tensor:
    """Values of pixel frames ``[P]`` as those of the latent frames that they show, ``[F]``."""
    if len(values) == clip.frames:
        return values
    later = metric.pooled(values[1:].view(clip.frames - 1, -1))
    return torch.cat([values[:1], later])


def _looks(metric: ClipMetric) -> Callable[[Clip], Tensor]:
    """How a metric that is not of pixels gets its curve of a clip.

    Raises:
        ValueError: Nobody knows what it takes.
    """
    if isinstance(metric, LatentMetric):
        return lambda clip: metric.curve(clip.latents, clip.reference_latents)
    if isinstance(metric, AttentionMetric):
        return lambda clip: metric.curve(clip.attention[metric.name])
    if isinstance(metric, WorldMetric):
        return lambda clip: metric.curve(clip.latents, clip.pixels, clip.scene, clip.context)
    raise ValueError(
        f"'{metric.name}' is a {type(metric).__name__}, and no rollout knows what that takes. "
        "Derive it from VideoMetric, LatentMetric, AttentionMetric or WorldMetric."
    )
