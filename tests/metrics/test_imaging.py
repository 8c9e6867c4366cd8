"""Measures of single frames against closed forms, plain loops, other libraries and a fake MUSIQ."""

from __future__ import annotations

import colorsys
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn

from lightning_kv.metrics.backbones import WeightsUnavailable, interpolators
from lightning_kv.metrics.backbones.interpolators import MUSIQ, shrunk
from lightning_kv.metrics.backbones.weights import published
from lightning_kv.metrics.base import read_clip
from lightning_kv.metrics.functional.imaging import (
    brightness,
    colourfulness,
    contrast,
    luma,
    saturation,
    sharpness,
)
from lightning_kv.metrics.imaging import (
    Brightness,
    Colourfulness,
    Contrast,
    ImagingQuality,
    Saturation,
    Sharpness,
)

METRICS = [Sharpness, Brightness, Contrast, Colourfulness, Saturation]


class Light(nn.Module):
    """Stands in for a network of image quality: a score from 0 to 100."""

    def forward(self, frames):
        return 100 * frames.mean((1, 2, 3)).unsqueeze(1)


def random_frames(frames: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames))


def colour(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 4, 4)


def grey(frame: torch.Tensor) -> np.ndarray:
    red, green, blue = frame.numpy().astype(np.float64)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_luma_weighs_the_channels_and_keeps_greys():
    frames = random_frames()
    expected = np.stack([grey(frame) for frame in frames])
    np.testing.assert_allclose(luma(frames).numpy(), expected, rtol=1e-12)
    levels = torch.linspace(0, 1, 256)
    found = luma(levels.view(-1, 1, 1, 1).expand(-1, 3, 1, 1)).flatten()
    torch.testing.assert_close(found, levels.double(), rtol=1e-15, atol=0)


def test_sharpness_is_scipys_laplacian():
    frames = random_frames()
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    expected = [
        ndimage.convolve(grey(frame), kernel, mode="constant")[1:-1, 1:-1].var() for frame in frames
    ]
    assert sharpness(frames).tolist() == pytest.approx(expected, rel=1e-10)
    ramp = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
    assert sharpness(ramp).item() == pytest.approx(0, abs=1e-12)


def test_brightness_and_contrast_are_numpys():
    frames = random_frames()
    assert brightness(frames).tolist() == pytest.approx([grey(f).mean() for f in frames], rel=1e-12)
    assert contrast(frames).tolist() == pytest.approx([grey(f).std() for f in frames], rel=1e-10)


def test_colourfulness_is_the_formula_on_a_scale_of_255():
    frames = random_frames()
    expected = []
    for red, green, blue in frames.numpy().astype(np.float64) * 255:
        rg, yb = red - green, (red + green) / 2 - blue
        spread = np.sqrt(rg.std() ** 2 + yb.std() ** 2)
        expected.append(spread + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2))
    assert colourfulness(frames).tolist() == pytest.approx(expected, rel=1e-10)
    # Plain blue: rg = 0, yb = -255.
    assert colourfulness(colour(0, 0, 1)).item() == pytest.approx(0.3 * 255)
    assert colourfulness(colour(0.4, 0.4, 0.4)).item() == pytest.approx(0, abs=1e-9)


def test_saturation_is_that_of_colorsys():
    frames = random_frames()
    frames[0, :, 0, 0] = 0
    expected = [
        np.mean([colorsys.rgb_to_hsv(*rgb)[1] for rgb in frame.double().flatten(1).T.tolist()])
        for frame in frames
    ]
    assert saturation(frames).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_curves_do_not_depend_on_blocks(metric, sizes):
    frames = random_frames(sum(sizes))
    blocks = [(block, None) for block in frames.split(sizes)]
    whole = read_clip({"": metric()}, [(frames, None)])[""]
    split = read_clip({"": metric()}, blocks)[""]
    assert whole.dtype == torch.float64
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", METRICS)
def test_8_bit_values_are_refused(metric):
    with pytest.raises(ValueError, match="divide 8-bit values by 255"):
        metric().curve(255 * random_frames())


def test_frames_are_shrunk_as_torchvision_shrinks_8_bits():
    transforms = pytest.importorskip("torchvision.transforms")
    for height, width in [(480, 832), (832, 480), (512, 512), (300, 200), (1030, 515)]:
        frames = random_frames(2, height, width)
        files = (frames * 255).round().to(torch.uint8)
        if max(height, width) > 512:
            scale = 512 / max(height, width)
            size = (int(scale * height), int(scale * width))
            files = transforms.Resize(size, antialias=False)(files)
        # Halves may be rounded to either side.
        difference = shrunk(frames, 512) * 255 - files
        assert shrunk(frames, 512).shape == files.shape
        assert difference.abs().max() <= 1.01 and (difference.abs() > 0.5).double().mean() < 1e-3


def test_imaging_quality_is_a_hundredth_of_the_score_of_every_frame():
    metric = ImagingQuality(MUSIQ(Light()))
    curve = metric.curve(torch.cat([colour(0.2, 0.2, 0.2), colour(1, 1, 1)]))
    assert curve.tolist() == pytest.approx([0.2, 1.0]) and curve.dtype == torch.float64
    assert metric.name == "imaging_quality/musiq-spaq"
    assert "longer side at most 512" in metric.recipe


def test_imaging_quality_needs_one_score_per_frame():
    with pytest.raises(ValueError, match="gives 108 numbers"):
        ImagingQuality(nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten()))


def test_imaging_quality_asks_for_the_licence(monkeypatch, tmp_path):
    monkeypatch.delenv("LIGHTNING_KV_ACCEPT_LICENSE", raising=False)
    path = tmp_path / "musiq_spaq_ckpt-358bb6af.pth"
    torch.save({}, path)
    with pytest.raises(WeightsUnavailable, match=r"CC-BY-NC-SA-4\.0"):
        ImagingQuality(given=path)


@pytest.mark.skipif(find_spec("pyiqa") is not None, reason="the package pyiqa is installed")
def test_a_missing_package_is_named(tmp_path):
    path = tmp_path / "musiq_spaq_ckpt-358bb6af.pth"
    torch.save({}, path)
    with pytest.raises(WeightsUnavailable, match="pip install pyiqa"):
        ImagingQuality(given=path, accept=["CC-BY-NC-SA-4.0"])


def test_weights_go_into_the_network_of_the_package(monkeypatch, tmp_path):
    """With a stand-in for the package: that the real one agrees is not tested."""

    class Network(nn.Module):
        def __init__(self, pretrained: bool) -> None:
            super().__init__()
            assert pretrained is False
            self.head = nn.Linear(3, 1)

        def forward(self, frames):
            assert not self.training
            return self.head(frames.mean((2, 3)))

    for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["pyiqa.archs.musiq_arch"].MUSIQ = Network
    monkeypatch.setattr(interpolators, "published", lambda n: replace(published(n), sha256=""))
    path = tmp_path / "musiq_spaq_ckpt-358bb6af.pth"
    state = {"head.weight": torch.tensor([[50.0, 25.0, 0.0]]), "head.bias": torch.tensor([10.0])}
    torch.save({"params": state}, path)
    metric = ImagingQuality(given=path, accept="CC-BY-NC-SA-4.0")
    assert metric.curve(colour(1, 0.2, 0.6)).item() == pytest.approx(0.65)
    torch.save({"params": {"head.weight": state["head.weight"]}}, path)
    with pytest.raises(ValueError, match=r"does not fit Network: .*head\.bias"):
        MUSIQ.load(path)
