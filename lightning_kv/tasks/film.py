"""Moving pictures of a clip: all policies side by side, and how far they are from the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lightning_kv.report.players import film_name
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.video import Frames, amplified, side_by_side, write_mp4

PANEL = 160  # pixels that a smaller picture is enlarged to
GAIN = 4  # of the difference

Rows = list[tuple[str, Frames]]
"""Panels, label and frames uint8 ``[f, H, W, 3]``, of some consecutive frames."""


def film(
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
            is no second film.
    """
    name = film_name(key)
    labels = [label for label, _ in next(rows())]
    if reference in labels and len(labels) > 1:
        pieces = (_differences(piece, reference) for piece in rows())
        write_mp4(run.differences / name, _panels(pieces, total), fps)
    # The last to come, so that it says of both that they are there: see filmed.
    write_mp4(run.videos / name, _panels(rows(), total), fps)


def filmed(run: RunDirectory, key: str) -> bool:
    """Whether a prompt's moving pictures are there, with the difference where there is one."""
    return (run.videos / film_name(key)).is_file()


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
