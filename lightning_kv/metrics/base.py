"""The contract of every metric of a clip: a per-frame curve, and sums that merge by addition."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from lightning_kv.metrics.panorama import Scene


BLOCK = 8  # pixel frames that a metric is shown at a time

Block = tuple[Tensor, "Tensor | None"]
"""Some consecutive pixel frames ``[f, 3, H, W]`` in [0, 1], and those of the reference."""

Reader = Callable[[Tensor, "Tensor | None"], Tensor]
"""Reads a clip block after block, in order; says the value of each frame shown, float64 ``[f]``."""


@dataclass(frozen=True)
class Clip:
    """Everything a metric may look at: one rollout, what it is compared with, and its world.

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

    def blocks(self) -> Iterator[Block]:
        """Pixels of this clip and of the reference, a few frames at a time."""
        if self.reference_pixels is None:
            yield from ((block, None) for block in self.pixels.split(BLOCK))
        else:
            yield from zip(
                self.pixels.split(BLOCK), self.reference_pixels.split(BLOCK), strict=True
            )

    def per_frame(self, values: Tensor) -> Tensor:
        """Values of pixel frames ``[P]`` as means of the latent frames that show them, ``[F]``."""
        if len(values) == self.frames:
            return values
        later = values[1:].view(self.frames - 1, -1).nanmean(1)
        return torch.cat([values[:1], later])


def _shows(frames: int, pixel_frames: int) -> bool:
    """Whether so many latent frames can be shown by so many pixel frames."""
    if frames == 1:
        return pixel_frames == 1
    return pixel_frames >= frames and (pixel_frames - 1) % (frames - 1) == 0


class SavedMetric(Metric):
    """A metric that ``state_dict`` holds: one that was loaded goes on where that stood.

    A subclass adds its states with ``persistent=True``.
    """

    full_state_update = False
    is_differentiable = False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torchmetrics would give the value remembered from before, or warn that there is none.
        if any(f"{prefix}{name}" in state_dict for name in self._defaults):
            self._computed = None
            self._update_count += 1
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ClipMetric(SavedMetric):
    """A metric that takes one clip per update and has a value for each of its frames.

    A clip's value is the mean over the frames that count; the metric is the mean over clips that
    have a value, NaN if there is none. The states are float64 sums, so ranks and shards with
    uneven numbers of clips merge by addition: to rounding, as the order of addition differs.

    A subclass sets the class attributes and writes :meth:`frame_values`:

    * ``name``: key in results.
    * ``unit``: unit of the value; empty for a dimensionless index.
    * ``higher_is_better``: which way is good; None where neither is.
    * ``recipe``: one exact sentence; values of different recipes must not be compared.
    * ``needs``: fields of :class:`Clip` that must be given.
    * ``identical``: its value for a clip that equals the reference, where it compares with that
      and the value is finite.

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

    name: str
    unit: str
    recipe: str
    needs: tuple[str, ...] = ()
    identical: float | None = None
    undefined = "no frame counts"  # why a clip may have no value

    total: Tensor
    clips: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "clips"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, zero, dist_reduce_fx="sum", persistent=True)

    @classmethod
    def against_reference(cls) -> bool:
        """Whether it compares with the reference, which then has no value of its own."""
        return any(need.startswith("reference") for need in cls.needs)

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

    def value(self, curve: Tensor) -> float | None:
        """What the curve of a clip comes to: its mean, unless a metric says otherwise."""
        return clip_value(curve)

    def update(self, clip: Clip | None, curve: Tensor | None = None) -> None:
        """Add one clip; one in which no frame counts changes nothing.

        Args:
            clip: The clip; may be None where the curve is given.
            curve: What :meth:`curve` says of it, where that is known already.
        """
        value = self.value(self.curve(clip) if curve is None else curve)
        if value is not None:
            self.total += value
            self.clips += 1

    def compute(self) -> Tensor:
        """Mean over clips, a float64 scalar; NaN if no clip had a value."""
        return self.total / self.clips


class PixelMetric(ClipMetric):
    """A metric that reads pixels in order, a few frames at a time, whatever the clip's length.

    A subclass writes :meth:`reader` instead of :meth:`ClipMetric.frame_values`.

    Example:
        >>> class Change(PixelMetric):
        ...     name, unit, higher_is_better = "change", "intensity", False
        ...     recipe = "mean absolute difference to the frame before, range [0, 1]"
        ...
        ...     def reader(self, prompt=None, fps=None):
        ...         last = []
        ...
        ...         def read(pixels, reference):
        ...             frames = torch.cat([*last, pixels]).double()
        ...             steps = frames.diff(dim=0).abs().mean((1, 2, 3))
        ...             unknown = steps.new_full((0 if last else 1,), torch.nan)
        ...             last[:] = [pixels[-1:]]
        ...             return torch.cat([unknown, steps])
        ...
        ...         return read
        >>> frames = torch.tensor([0.0, 0.5, 0.25]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
        >>> Change().curve(Clip(pixels=frames)).tolist()
        [nan, 0.5, 0.25]
    """

    needs = ("pixels",)

    @abstractmethod
    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """What reads one clip; made fresh for each.

        Args:
            prompt: What the model was told.
            fps: Frames per second.
        """

    def frame_values(self, clip: Clip) -> Tensor:
        """Values of the pixel frames; several that show one latent frame are averaged."""
        return clip.per_frame(read_clip({"": self}, clip.blocks(), clip.prompt, clip.fps)[""])


def read_clip(
    metrics: Mapping[str, PixelMetric],
    blocks: Iterable[Block],
    prompt: str | None = None,
    fps: float | None = None,
    problems: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Curves of several metrics in one pass over the pixels, which are never held as a whole.

    Args:
        metrics: By name.
        blocks: The clip, block after block; every block may have another number of frames.
        prompt: What the model was told.
        fps: Frames per second.
        problems: Where given, takes up why a metric cannot judge this clip, by name; the others
            go on.

    Returns:
        Value of every pixel frame, float64 ``[P]`` on the CPU, NaN where it has none, by name;
        nothing for a metric with a problem.

    Raises:
        ValueError: A metric cannot judge this clip, and ``problems`` is not given.
    """
    readers: dict[str, Reader] = {}
    for name, metric in metrics.items():
        with noting(problems, name):
            readers[name] = metric.reader(prompt, fps)
    places = {name: metric.device for name, metric in metrics.items()}
    # Numbers and not tensors: small tensors that stay, between large ones that go, split the free
    # memory into pieces that fit no block, and the process grows with the clip.
    found: dict[str, list[float]] = {name: [] for name in readers}
    for block in blocks:
        moved = {
            place: tuple(None if x is None else x.to(place) for x in block)
            for place in set(places.values())
        }
        for name, read in readers.items():
            if name in found:
                with noting(problems, name):
                    found[name] += read(*moved[places[name]]).tolist()
                    continue
                del found[name]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


@contextmanager
def noting(problems: dict[str, str] | None, name: str) -> Iterator[None]:
    """Take up the ValueError of what is done inside, under a name; without a dict it goes on.

    Example:
        >>> problems = {}
        >>> with noting(problems, "width"):
        ...     int("wide")
        >>> list(problems)
        ['width']
    """
    try:
        yield
    except ValueError as error:
        if problems is None:
            raise
        problems[name] = str(error)


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
