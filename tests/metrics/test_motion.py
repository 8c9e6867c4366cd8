"""Change between frames against closed forms and plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv.metrics.base import clip_value, read_clip
from lightning_kv.metrics.functional.motion import eight_bit
from lightning_kv.metrics.motion import FrameChange, TemporalFlicker

METRICS = [TemporalFlicker, FrameChange]


def constant(*levels: float) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def random_frames(frames: int = 7) -> torch.Tensor:
    return torch.rand(frames, 3, 6, 5, generator=torch.Generator().manual_seed(frames))


def test_flicker_of_a_still_and_of_an_alternating_video():
    assert clip_value(TemporalFlicker().curve(constant(0.3, 0.3, 0.3))) == 1.0
    assert clip_value(TemporalFlicker().curve(constant(0.0, 1.0, 0.0, 1.0))) == 0.0


def test_flicker_is_vbenchs_on_files_of_8_bits():
    frames = random_frames()
    files = np.round(frames.numpy().astype(np.float64) * 255).astype(np.uint8)
    steps = [
        np.abs(a.astype(np.int16) - b.astype(np.int16)).mean()
        for a, b in zip(files[1:], files[:-1], strict=True)
    ]
    expected = (255.0 - np.mean(steps)) / 255.0
    assert clip_value(TemporalFlicker().curve(frames)) == pytest.approx(expected, rel=1e-12)


def test_flicker_does_not_see_what_8_bits_do_not_hold():
    almost = torch.cat([constant(100 / 255), constant(100.4 / 255)])
    assert TemporalFlicker().curve(almost)[1].item() == 1.0
    assert FrameChange().curve(almost)[1].item() == pytest.approx(0.4 / 255, rel=1e-3)


def test_change_is_that_of_numpy():
    frames = random_frames()
    expected = np.abs(np.diff(frames.numpy().astype(np.float64), axis=0)).mean((1, 2, 3))
    curve = FrameChange().curve(frames)
    assert curve[0].isnan() and curve.dtype == torch.float64
    assert curve[1:].tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_curves_do_not_depend_on_blocks(metric, sizes):
    frames = random_frames(sum(sizes))
    blocks = [(block, None) for block in frames.split(sizes)]
    whole = read_clip({"": metric()}, [(frames, None)])[""]
    split = read_clip({"": metric()}, blocks)[""]
    # Sums in float64, in an order that may depend on how many frames come at a time.
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
def test_the_first_frame_has_no_value(metric):
    one = metric()
    one.update(random_frames(1)[None])
    assert one.compute().isnan()
    curve = metric().curve(random_frames(5))
    assert curve.isnan().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "pixels", [torch.full((2, 3, 4, 4), 200.0), -torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4, 4)]
)
def test_what_is_no_pixel_is_refused(metric, pixels):
    with pytest.raises(ValueError, match=r"Pass (floats|pixels)"):
        metric().curve(pixels)


def test_8_bits_are_whole_numbers():
    levels = torch.arange(256).float()
    assert torch.equal(eight_bit((levels / 255).view(-1, 1, 1, 1).expand(-1, 3, 1, 1))[:, 0, 0, 0],
                       levels)  # fmt: skip
    with pytest.raises(ValueError, match="divide 8-bit values by 255"):
        eight_bit(torch.ones(1, 3, 2, 2, dtype=torch.uint8))
