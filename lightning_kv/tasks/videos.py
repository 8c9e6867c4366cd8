"""Pixels as videos: one clip, or all policies side by side and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lightning_kv.report.players import video_name
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.video import Frames, amplified, side_by_side, write_mp4

PANEL = 160  # pixels that a smaller picture is enlarged to
GAIN = 4  # of the difference
WIDTH = 320  # pixels that a smaller video is enlarged to, about

Rows = list[tuple[str, Frames]]
"""Panels, label and frames uint8 ``[f, H, W, 3]``, of some consecutive frames."""


def write_comparison(
    run: RunDirectory,
    key: str,
    rows: Callable[[], Iterator[Rows]],
    total: int,
    fps: float,
    reference: str,
) -> None:
    """Write ``videos/KEY.mp4`` and ``videos/difference/KEY.mp4``.

    Args:
        run: Where they go.
        key: Of the prompt; slashes become two underscores.
        rows: Gives the panels piece by piece, from the beginning each time it is called.
        total: Frames of the clip.
        fps: Frames per second.
        reference: Label of the panel that the others are compared with; without such a panel there
            is no second video.
    """
    name = video_name(key)
    labels = [label for label, _ in next(rows())]
    if reference in labels and len(labels) > 1:
        pieces = (_differences(piece, reference) for piece in rows())
        write_mp4(run.differences / name, _panels(pieces, total), fps)
    # The last to come, so that it says of both that they are there: see has_comparison.
    write_mp4(run.videos / name, _panels(rows(), total), fps)


def has_comparison(run: RunDirectory, key: str) -> bool:
    """Whether a prompt's videos are there, with the difference where there is one."""
    return (run.videos / video_name(key)).is_file()


def _panels(pieces: Iterator[Rows], total: int) -> Iterator[Frames]:
    start = 0
    for rows in pieces:
        columns = 3 if len(rows) in (3, 5, 6, 9) else 4
        scale = max(1, PANEL // rows[0][1].shape[2])
        yield side_by_side(rows, scale, columns, start, total)
        start += len(rows[0][1])


def _differences(rows: Rows, reference: str) -> Rows:
    """The reference as it is, the others as their amplified difference to it."""
    base = dict(rows)[reference]
    return [
        (label, frames)
        if label == reference
        else (f"{label}, difference x{GAIN}", amplified(frames, base, GAIN))
        for label, frames in rows
    ]


def picture(pixels: Tensor) -> np.ndarray:
    """Pixels ``[F, 3, H, W]`` in [0, 1] as uint8 ``[F, H, W, 3]``; what is not finite is black."""
    shown = (255 * pixels.nan_to_num(0)).round().byte()
    return shown.permute(0, 2, 3, 1).cpu().numpy()


def fitted(pixels: Tensor, width: int = 320) -> np.ndarray:
    """A picture of at most ``width`` pixels: larger ones are averaged over whole blocks.

    Args:
        pixels: ``[F, 3, H, W]`` in [0, 1], or uint8.
        width: The most pixels across.
    """
    pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
    block = -(-pixels.shape[-1] // width)
    return picture(avg_pool2d(pixels, block) if block > 1 else pixels)


def enlarged(pieces: Iterator[Tensor]) -> Iterator[Frames]:
    """Pixels ``[n, 3, H, W]`` as pictures; small ones are enlarged."""
    for piece in pieces:
        frames = picture(piece)
        scale = max(1, round(WIDTH / frames.shape[2]))
        yield frames.repeat(scale, axis=1).repeat(scale, axis=2)
