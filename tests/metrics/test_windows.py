"""Features of windows against slices of the whole clip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_kv.metrics.backbones.base import Backbone, RandomBackbone, Wrapped
from lightning_kv.metrics.windows import FRAMES, WindowEncoder


class Mean(nn.Module):
    """The mean colour of a clip, which no rounding of a network blurs."""

    num_features = 3

    def __init__(self, clip_len):
        super().__init__()
        self.clip_len = clip_len

    def forward(self, block):
        axes = (2, 3) if self.clip_len is None else (1, 3, 4)
        return block.mean(axes)


def shown(windows, frames, sizes):
    for block in frames.split(sizes):
        windows.add(block)
    return windows.features()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_windows_are_slices(data):
    clip_len = data.draw(st.sampled_from([None, 1, 4, 8]))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    skip = data.draw(st.integers(0, 20))
    frames = torch.rand(sum(sizes), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = shown(WindowEncoder(Wrapped(Mean(clip_len))).windows(skip), frames, sizes)
    length = clip_len or FRAMES
    left = frames[skip:]
    starts = range(0, len(left) - length + 1, length)
    expected = [left[start : start + length].mean((0, 2, 3)) for start in starts]
    assert found.shape == (len(expected), 3) and found.dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_network_sees_the_same_as_directly(dims):
    encoder: Backbone = RandomBackbone(dims)
    frames = torch.rand(37, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = shown(WindowEncoder(encoder).windows(2), frames, 5)
    length = 16 if dims == 2 else 8
    clips = frames[2 : 2 + (35 // length) * length].unflatten(0, (-1, length))
    direct = encoder(clips.flatten(0, 1)).unflatten(0, (-1, 16)).mean(1) if dims == 2 else None
    assert torch.allclose(found, encoder(clips) if direct is None else direct, atol=1e-6)


def test_a_clip_that_is_too_short_has_no_feature():
    windows = WindowEncoder(RandomBackbone(3)).windows(3)
    windows.add(torch.zeros(10, 3, 16, 16))
    assert windows.features().shape == (0, 32)
    windows.add(torch.zeros(1, 3, 16, 16))
    assert windows.features().shape == (1, 32)
