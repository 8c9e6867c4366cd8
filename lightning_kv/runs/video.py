"""Videos: labelled panels side by side, written as H.264."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lightning_kv.utilities.files import replacing

Frames = NDArray[np.uint8]

FONT_SIZE = 17  # pixels
STRIP = 26  # pixels: height of a line of text
MARGIN = 6  # pixels: left and right of a text, and between panels
BACKGROUND, INK = 24, 235  # grey levels


def write_mp4(path: str | Path, frames: Frames | Iterable[Frames], fps: float) -> None:
    """Write frames as an H.264 file that any browser plays; a whole file or none.

    The same frames give the same bytes.

    Odd sizes are made even by repeating the last row or column: yuv420p halves them.

    Args:
        path: File to write.
        frames: uint8 ``[F, H, W, 3]``, RGB; or pieces of it, one after the other, of which one at a
            time is held.
        fps: Frames per second.

    Raises:
        ValueError: The frames have another shape or type, or there are none.
    """
    pieces = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = _checked(next(pieces, np.empty((0, 0, 0, 3), np.uint8)), "frames")
    height, width = first.shape[1:3]
    whole = Path(path).absolute()  # the library takes "a:b.mp4" alone for a protocol
    with (
        replacing(whole) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree gives other bytes from time to time, with one thread too.
        stream.options = {"crf": "20", "x264-params": "mbtree=0"}
        for piece in chain([first], pieces):
            even = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
            for frame in np.pad(_checked(piece, "frames"), even, mode="edge"):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
        container.mux(stream.encode())


def side_by_side(
    rows: list[tuple[str, Frames]],
    scale: int,
    columns: int | None = None,
    start: int = 0,
    total: int | None = None,
) -> Frames:
    """Panels from left to right, each under its label, above a frame counter.

    A panel is never narrower than its label, so every name can be read.

    Args:
        rows: Label and frames, uint8 ``[F, H, W, 3]``, of each panel; equal shapes.
        scale: Every pixel becomes ``scale`` x ``scale`` pixels.
        columns: Panels in a line; more go on in the next line. None: all in one line.
        start: Frames of the clip before these, for the counter.
        total: Frames of the whole clip; these alone where None.

    Returns:
        uint8 ``[F, H', W', 3]``.

    Raises:
        ValueError: No panels, unequal shapes, or a scale or number of columns below 1.
    """
    shapes = [_checked(frames, label).shape for label, frames in rows]
    columns = len(rows) if columns is None else columns
    if len(set(shapes)) != 1 or scale < 1 or columns < 1:
        raise ValueError(
            f"These panels cannot stand side by side. Given shapes {shapes}, scale {scale} and "
            f"{columns} columns. Give one panel or more, all of one shape, and a scale and a "
            "number of columns of 1 or more."
        )
    count, _, width, _ = shapes[0]
    width = max(width * scale, *(_text_width(label) + 2 * MARGIN for label, _ in rows))
    panels = [_panel(label, frames, scale, width) for label, frames in rows]
    columns = min(columns, len(panels))
    panels += [np.full_like(panels[0], BACKGROUND)] * (-len(panels) % columns)
    lines = [_joined(panels[i : i + columns], axis=2) for i in range(0, len(panels), columns)]
    canvas = _joined(lines, axis=1)
    numbers = range(start + 1, start + count + 1)
    counter = [_strip(f"frame {i} / {total or count}", canvas.shape[2]) for i in numbers]
    return np.concatenate([canvas, np.stack(counter)], axis=1)


def amplified(frames: Frames, reference: Frames, gain: int) -> Frames:
    """How far frames are from a reference: absolute difference times ``gain``, black where equal.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        reference: The same shape.
        gain: Factor; what would be brighter than white is white.

    Raises:
        ValueError: Other shapes or types.

    Example:
        >>> grey = np.full((1, 2, 2, 3), 100, np.uint8)
        >>> int(amplified(grey + 5, grey, gain=4).max())
        20
    """
    first, second = _checked(frames, "frames"), _checked(reference, "reference")
    if first.shape != second.shape:
        raise ValueError(
            f"Two videos cannot be compared: their shapes are {first.shape} and "
            f"{second.shape}. Give two of equal shape."
        )
    far = np.abs(first.astype(np.int16) - second) * gain
    return far.clip(0, 255).astype(np.uint8)


def _joined(parts: list[Frames], axis: int) -> Frames:
    """Parts with a gap between each two."""
    shape = list(parts[0].shape)
    shape[axis] = MARGIN
    gap = np.full(shape, BACKGROUND, np.uint8)
    return np.concatenate([part for each in parts for part in (each, gap)][:-1], axis=axis)


def _checked(frames: Frames, name: str) -> Frames:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(
            f"{name!r} is no video. Given {frames.dtype} of shape {frames.shape}. "
            "Give uint8 of shape [frames, height, width, 3] with one frame or more."
        )
    return frames


def _panel(label: str, frames: Frames, scale: int, width: int) -> Frames:
    """Enlarge frames, centre them on ``width`` pixels and put the label above."""
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    spare = width - large.shape[2]
    sides = ((0, 0), (0, 0), (spare // 2, spare - spare // 2), (0, 0))
    large = np.pad(large, sides, constant_values=BACKGROUND)
    title = np.broadcast_to(_strip(label, width), (len(frames), STRIP, width, 3))
    return np.concatenate([title, large], axis=1)


def _strip(text: str, width: int) -> Frames:
    """A line of text, uint8 ``[STRIP, width, 3]``."""
    image = Image.new("RGB", (width, STRIP), (BACKGROUND,) * 3)
    place = (MARGIN, STRIP // 2)
    ImageDraw.Draw(image).text(place, text, (INK,) * 3, _font(), anchor="lm")
    return np.asarray(image)


def _text_width(text: str) -> int:
    return int(np.ceil(_font().getlength(text)))


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)
