"""Videos: read again with PyAV, and compared pixel by pixel before they are encoded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lightning_kv.data.panorama import world_for
from lightning_kv.runs.video import side_by_side, write_mp4

COLOURS = np.array([(200, 40, 40), (40, 180, 60), (50, 60, 210), (230, 220, 90)], np.uint8)


def flat(count: int, height: int, width: int) -> np.ndarray:
    """Frames of one colour each."""
    frames = COLOURS[np.arange(count) % len(COLOURS)]
    return np.broadcast_to(frames[:, None, None], (count, height, width, 3))


def decoded(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), stream


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
@pytest.mark.parametrize("fps", [8, 12.5])
def test_a_file_reads_back(tmp_path: Path, height: int, width: int, fps: float) -> None:
    frames = flat(7, height, width)
    write_mp4(tmp_path / "clip.mp4", frames, fps)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    back, stream = decoded(tmp_path / "clip.mp4")
    assert back.shape == (7, height + height % 2, width + width % 2, 3)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert float(stream.average_rate) == fps
    np.testing.assert_allclose(back.mean((1, 2)), frames.mean((1, 2)), atol=4)


def test_an_odd_edge_repeats_the_last_column(tmp_path: Path) -> None:
    frames = np.zeros((1, 16, 17, 3), np.uint8)
    frames[:, :, 14:] = 255
    write_mp4(tmp_path / "edge.mp4", frames, 4)
    back, _ = decoded(tmp_path / "edge.mp4")
    assert back[0, :, 17].mean() > 240


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "clip.mp4"
    write_mp4(file, flat(2, 16, 16), 4)
    before = file.read_bytes()
    real, calls = av.VideoFrame.from_ndarray, []

    class Failing:
        @staticmethod
        def from_ndarray(array: np.ndarray, format: str) -> av.VideoFrame:
            calls.append(format)
            if len(calls) > 1:
                raise RuntimeError("the encoder died")
            return real(array, format=format)

    monkeypatch.setattr(av, "VideoFrame", Failing)
    with pytest.raises(RuntimeError, match="died"):
        write_mp4(file, flat(3, 16, 16), 4)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((2, 3, 16, 16), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
    ],
)
def test_what_is_no_moving_picture_is_refused(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Give uint8 of shape"):
        write_mp4(tmp_path / "bad.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


def test_panels_are_enlarged_exactly_and_kept_in_order() -> None:
    draw = np.random.default_rng(0)
    left, right = draw.integers(100, 200, (2, 3, 16, 24, 3), np.uint8)
    scale = 5
    canvas = side_by_side([("a", left), ("b", right)], scale)
    height, width = 16 * scale, 24 * scale
    gap = canvas.shape[2] - 2 * width
    strip = (canvas.shape[1] - height) // 2
    assert gap > 0
    assert strip > 8
    body = canvas[:, strip : strip + height]
    for y, x in np.ndindex(height, width):
        assert (body[:, y, x] == left[:, y // scale, x // scale]).all()
        assert (body[:, y, width + gap + x] == right[:, y // scale, x // scale]).all()


def text_mask(canvas: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Where something is written: above the panels and below them, ``[F, rows, columns]``."""
    strip = (canvas.shape[1] - height) // 2
    bright = canvas.max(-1) > 128
    return bright[:, :strip], bright[:, strip + height :]


def test_labels_differ_stay_and_fit() -> None:
    black = np.zeros((12, 8, 8, 3), np.uint8)
    names = ("full (reference)", "sliding-window@9f")
    canvas = side_by_side([(name, black) for name in names], 1)
    labels, counter = text_mask(canvas, 8)
    assert (labels == labels[0]).all(), "a label does not change in time"
    half = canvas.shape[2] // 2
    first, second = labels[0, :, :half], labels[0, :, -half:]
    assert first.any()
    assert second.any()
    assert (first != second).any()
    for label in (first, second):
        columns = np.flatnonzero(label.any(0))
        assert columns[0] > 0
        assert columns[-1] < half - 1, "the text ends before its panel does"
    seen = {frame.tobytes() for frame in counter}
    assert len(seen) == 12, "every frame has its own number"


def test_a_narrow_panel_is_centred_under_its_label() -> None:
    canvas = side_by_side([("a rather long name", np.full((1, 8, 8, 3), 200, np.uint8))], 2)
    columns = np.flatnonzero((canvas[0] == 200).all(-1).sum(0) >= 16)
    assert len(columns) == 16
    assert abs(columns[0] - (canvas.shape[2] - 1 - columns[-1])) <= 1


@pytest.mark.parametrize(("count", "columns"), [(1, 3), (3, 3), (5, 3), (7, 2), (4, None)])
def test_panels_go_on_in_the_next_line(count: int, columns: int | None) -> None:
    # Every panel has a grey level of its own, and is wider than its one-letter label.
    levels = [60 + 20 * index for index in range(count)]
    rows = [
        (chr(ord("a") + index), np.full((2, 16, 24, 3), level, np.uint8))
        for index, level in enumerate(levels)
    ]
    canvas = side_by_side(rows, 2, columns)[0]
    across = min(columns or count, count)
    boxes = []
    for level in levels:
        ys, xs = np.nonzero((canvas == level).all(-1))
        inside = [(y, x) for y, x in zip(ys, xs, strict=True) if _block(canvas, y, x, level)]
        (top, left), (bottom, right) = inside[0], inside[-1]
        assert (bottom - top, right - left) == (24, 40), "all 32 x 48 pixels of a panel are there"
        boxes.append((top, left))
    tops, lefts = sorted({y for y, _ in boxes}), sorted({x for _, x in boxes})
    assert boxes == [(tops[i // across], lefts[i % across]) for i in range(count)]
    assert (len(lefts), len(tops)) == (across, -(-count // across))
    steps = {b - a for a, b in pairwise(lefts)}
    assert len(steps) < 2
    assert min(steps, default=49) > 48
    assert canvas.shape[1] == lefts[-1] + 48


def _block(canvas: np.ndarray, y: int, x: int, level: int) -> bool:
    """Whether an 8 x 8 block of one level starts here: no label holds one."""
    block = canvas[y : y + 8, x : x + 8]
    return block.shape == (8, 8, 3) and bool((block == level).all())


@pytest.mark.parametrize(
    ("rows", "scale", "columns"),
    [
        ([], 2, None),
        ([("a", flat(2, 8, 8)), ("b", flat(3, 8, 8))], 2, None),
        ([("a", flat(2, 8, 8)), ("b", flat(2, 8, 6))], 2, None),
        ([("a", flat(2, 8, 8))], 0, None),
        ([("a", flat(2, 8, 8))], 1, 0),
    ],
)
def test_panels_that_do_not_fit_are_refused(rows: list, scale: int, columns: int | None) -> None:
    with pytest.raises(ValueError, match="side by side"):
        side_by_side(rows, scale, columns)


def test_the_same_frames_give_the_same_bytes(tmp_path):
    world = world_for("night fast n10 left", 5).render(60)
    jumps = torch.rand(60, 1, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.2
    shown = torch.where(jumps, world.flip(0), world)  # as of a cache that has lost its way
    frames = (255 * shown).round().byte().permute(0, 2, 3, 1).numpy()
    frames = frames.repeat(10, axis=1).repeat(10, axis=2)
    for file in "abcde":
        write_mp4(tmp_path / f"{file}.mp4", frames, 8.0)
    assert len({(tmp_path / f"{file}.mp4").read_bytes() for file in "abcde"}) == 1
