"""How clips are shown to metrics: block after block, to several of them in one pass."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_kv.metrics.base import VideoMetric

BLOCK = 8  # pixel frames that a metric is shown at a time

Block = tuple[Tensor, "Tensor | None"]
"""Some consecutive pixel frames ``[f, 3, H, W]`` in [0, 1], and those of the target."""

Reader = Callable[[Tensor, "Tensor | None"], Tensor]
"""Reads a clip block after block, in order; says the value of each frame shown, float64 ``[f]``."""


class ClipReader:
    """Curves of several metrics in one pass over the pixels, which are never held as a whole.

    Args:
        metrics: By name.
        prompt: What the model was told.
        fps: Frames per second.
        problems: Where given, takes up why a metric cannot judge this clip, by name; the others
            go on.

    Raises:
        ValueError: A metric cannot judge this clip, and ``problems`` is not given.
    """

    def __init__(
        self,
        metrics: Mapping[str, VideoMetric],
        prompt: str | None = None,
        fps: float | None = None,
        problems: dict[str, str] | None = None,
    ) -> None:
        self.problems = problems
        self.readers: dict[str, Reader] = {}
        for name, metric in metrics.items():
            with noting(problems, name):
                self.readers[name] = metric.reader(prompt, fps)
        self.names = {name: metric.name for name, metric in metrics.items()}
        self.places = {name: metrics[name].device for name in self.readers}
        # Numbers and not tensors: small tensors that stay, between large ones that go, split the
        # free memory into pieces that fit no block, and the process grows with the clip.
        self.found: dict[str, list[float]] = {name: [] for name in self.readers}

    def read(self, block: Block) -> None:
        """Show the next frames, every time as many as one likes."""
        moved = {
            place: tuple(None if x is None else x.to(place) for x in block)
            for place in {self.places[name] for name in self.found}
        }
        for name in list(self.found):
            with noting(self.problems, name):
                values = self.readers[name](*moved[self.places[name]])
                self.found[name] += per_frame(self.names[name], values, len(block[0])).tolist()
                continue
            del self.found[name]

    def curves(self) -> dict[str, Tensor]:
        """Value of every frame, float64 ``[P]`` on the CPU, NaN where it has none, by name.

        Nothing for a metric with a problem.
        """
        return {name: torch.tensor(x, dtype=torch.float64) for name, x in self.found.items()}


FROM = "its frame_values, or from what its reader returns"


def per_frame(metric: str, values: Any, frames: int, source: str = FROM) -> Tensor:
    """The values of frames, if they are one for each.

    Args:
        metric: Its name.
        values: What it said of the frames.
        frames: How many it was shown.
        source: What has to say them.

    Raises:
        ValueError: They are others.
    """
    if isinstance(values, Tensor) and values.shape == (frames,) and not values.is_complex():
        return values
    raise ValueError(
        f"'{metric}' must say one value per frame: it was shown {frames} frames, and said "
        f"{_said(values)}. Return a tensor [{frames}] from {source}."
    )


def _said(values: Any) -> str:
    if isinstance(values, Tensor):
        return f"a tensor {tuple(values.shape)} of {values.dtype}"
    return f"{type(values).__name__} {reprlib.repr(values)}"


def read_clip(
    metrics: Mapping[str, VideoMetric],
    blocks: Iterable[Block],
    prompt: str | None = None,
    fps: float | None = None,
    problems: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Curves of several metrics over a clip that comes block after block.

    Args:
        metrics: As in :class:`ClipReader`.
        blocks: The clip; every block may have another number of frames.
        prompt: As in :class:`ClipReader`.
        fps: As in :class:`ClipReader`.
        problems: As in :class:`ClipReader`.

    Returns:
        As :meth:`ClipReader.curves`.

    Raises:
        ValueError: As :class:`ClipReader`.
    """
    reader = ClipReader(metrics, prompt, fps, problems)
    for block in blocks:
        reader.read(block)
    return reader.curves()


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
