"""Pictures of memory, pixel by pixel against hand-made traces."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lightning_kv.report import pictures

CHUNKS, CHUNK, FRAMES = 5, 3, 15


def a_trace(layers: int = 1, heads: int = 1, frames: int = FRAMES, asked: int = CHUNK) -> dict:
    """Only the chunk's own frames are held and read."""
    held = np.zeros((CHUNKS, layers, heads, frames), np.uint8)
    for chunk in range(CHUNKS):
        held[chunk, ..., chunk * CHUNK : (chunk + 1) * CHUNK] = 255
    read = np.repeat(held[:, None], asked, axis=1)
    return {"held": held, "read": read, "weight": held.astype(np.float16) / 255}


def hold(trace: dict, where: tuple, tokens: float = 1.0) -> None:
    """Hold frames whole at ``[chunk, layer, head, frame]``; they stand for ``tokens`` frames."""
    trace["held"][where] = 255
    trace["weight"][where] = tokens


def colour(rgb: tuple[int, int, int]) -> list[int]:
    return [*rgb, 255]


@pytest.mark.parametrize("frames", [FRAMES, FRAMES - 1])
@pytest.mark.parametrize("asked", [1, CHUNK])
def test_a_sliding_window_is_a_band_along_the_diagonal(frames: int, asked: int) -> None:
    trace = a_trace(frames=frames, asked=asked)
    for chunk in range(CHUNKS):
        window = slice(max(0, chunk * CHUNK - 4), chunk * CHUNK)
        hold(trace, (chunk, 0, 0, window))
        trace["read"][chunk, :, 0, 0, window] = 255
    (panel,) = pictures.panels(trace, 0)
    assert panel.shape == (frames, frames, 4)
    for line, frame in np.ndindex(frames, frames):
        start = line // CHUNK * CHUNK
        if frame >= start + CHUNK:
            assert panel[line, frame, 3] == 0, "does not exist yet"
        else:
            age = start - frame  # of the chunk's first frame
            expected = pictures.OWN if age <= 0 else pictures.READ if age <= 4 else pictures.GONE
            assert panel[line, frame].tolist() == colour(expected)


def test_what_each_query_frame_reads_has_its_own_line() -> None:
    trace = a_trace()
    hold(trace, (4, 0, 0, slice(0, 12)))
    picks = {0: {1, 5}, 1: {5}, 2: {11}}
    for query, frames in picks.items():
        trace["read"][4, query, 0, 0, list(frames)] = 255
    (panel,) = pictures.panels(trace, 0)
    for query, frames in picks.items():
        for frame in range(12):
            expected = pictures.READ if frame in frames else pictures.HELD
            assert panel[12 + query, frame].tolist() == colour(expected)
    (alone,) = pictures.panels(trace, 0, only=4)
    np.testing.assert_array_equal(alone, panel[12:])
    assert pictures.query_frames_differ(trace)
    assert not pictures.query_frames_differ(a_trace())


def test_rows_that_stand_for_others_turn_orange() -> None:
    trace = a_trace()
    for frame, tokens in enumerate((1.0, 1.5, 2.0, 4.0)):
        hold(trace, (4, 0, 0, frame), tokens)
        hold(trace, (3, 0, 0, frame), tokens)
    trace["read"][4, :, 0, 0, :4] = 255
    (panel,) = pictures.panels(trace, 0)
    held, read = panel[9, :4], panel[12, :4]
    assert held[0].tolist() == colour(pictures.HELD)
    assert read[0].tolist() == colour(pictures.READ)
    half = (np.array(pictures.READ) + np.array(pictures.MERGED_READ)) / 2
    np.testing.assert_allclose(read[1, :3], half)
    for full in (2, 3):
        assert held[full].tolist() == colour(pictures.MERGED_HELD)
        assert read[full].tolist() == colour(pictures.MERGED_READ)


@pytest.mark.parametrize("tokens", [1, 2, 5, 7, 16, 1560])
def test_rounding_on_disk_is_no_merge(tokens: int) -> None:
    trace = a_trace()
    for kept in range(1, tokens + 1, max(tokens // 20, 1)):
        share = kept / tokens
        trace["held"][4, 0, 0, 0] = np.rint(255 * share)
        trace["weight"][4, 0, 0, 0] = np.float16(share)
        red, _, blue, _ = pictures.panels(trace, 0, only=4)[0, 0, 0]
        assert red <= blue


def test_half_of_a_frame_is_half_as_strong() -> None:
    trace = a_trace()
    trace["held"][4, 0, 0, 0], trace["weight"][4, 0, 0, 0] = 128, 128 / 255
    pixel = pictures.panels(trace, 0)[0, 12, 0, :3]
    share = 128 / 255
    expected = np.array(pictures.GONE) * (1 - share) + np.array(pictures.HELD) * share
    np.testing.assert_allclose(pixel, expected, atol=0.5)


def test_the_overview_is_the_mean_over_layers_and_heads() -> None:
    trace = a_trace(layers=2, heads=2)
    hold(trace, (4, 0, 0, 3))
    pixel = pictures.overview(trace)[12, 3, :3]
    expected = (3 * np.array(pictures.GONE) + np.array(pictures.HELD)) / 4
    np.testing.assert_allclose(pixel, expected, atol=0.51)


def test_a_strip_shows_the_mean_and_then_every_head() -> None:
    trace = a_trace(layers=2, heads=3)
    for head in range(3):
        hold(trace, (4, 1, head, head))
    strip = pictures.strip(trace, 1)
    step = FRAMES + pictures.GAP
    assert strip.shape == (FRAMES, 4 * step - pictures.GAP, 4)
    for head in range(3):
        own = strip[:, (head + 1) * step : (head + 1) * step + FRAMES]
        np.testing.assert_array_equal(own, np.rint(pictures.panels(trace, 1)[head]))
    assert not strip[:, FRAMES:step].any(), "the gap is transparent"
    assert len({tuple(pixel) for pixel in strip[12, :3].tolist()}) == 1
    assert pictures.strip(a_trace(), 0).shape == (FRAMES, FRAMES, 4), "one head is its own mean"


def test_the_close_up_has_a_band_per_head_and_a_line_per_query_frame() -> None:
    trace = a_trace(layers=2, heads=2)
    for layer, head, query in np.ndindex(2, 2, CHUNK):
        hold(trace, (3, layer, head, slice(0, 9)))
        trace["read"][3, query, layer, head, 4 * layer + 2 * head + (query > 0)] = 255
    view = pictures.close_up(trace, 3)
    assert view.shape == (2 * 2 * (CHUNK + 1) + 2 - 2, 12, 4), "frames after the chunk are cut"
    for layer, head, query in np.ndindex(2, 2, CHUNK):
        line = view[layer * (2 * (CHUNK + 1) + 1) + head * (CHUNK + 1) + query]
        read = [frame for frame in range(9) if line[frame].tolist() == colour(pictures.READ)]
        assert read == [4 * layer + 2 * head + (query > 0)]


def test_a_policy_is_described_by_what_it_does_in_the_last_chunk() -> None:
    trace = a_trace(heads=2)
    assert pictures.describe(trace) == "keeps 0 of 12 past frames, reads 0"
    hold(trace, (4, 0, slice(None), slice(0, 6)))
    trace["read"][4, :, 0, :, :2] = 255
    assert pictures.describe(trace) == "keeps 6 of 12 past frames, reads 2"
    assert not pictures.heads_differ(trace)
    trace["read"][4, 0, 0, 0, 5] = 255  # one more for one of the three query frames of one head
    assert pictures.describe(trace) == (
        "keeps 6 of 12 past frames, reads 2.2; heads read different ones; "
        "query frames read different ones"
    )
    hold(trace, (4, 0, 1, 7), tokens=4.0)
    assert pictures.describe(trace).startswith(
        "keeps 6.5 of 12 past frames, reads 2.2; what is kept stands for 8; heads keep different"
    )
    assert pictures.heads_differ(trace)


def test_a_png_reads_back() -> None:
    strip = pictures.strip(a_trace(heads=2), 0)
    with Image.open(io.BytesIO(pictures.png(strip))) as image:
        np.testing.assert_array_equal(np.asarray(image), strip)
