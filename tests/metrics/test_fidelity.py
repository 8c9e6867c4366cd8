"""Fidelity to the reference rollout against closed forms, torchmetrics and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from lightning_kv.metrics import METRICS
from lightning_kv.metrics.base import ClipMetric, read_clip
from lightning_kv.metrics.fidelity import (
    MSSSIM,
    PSNR,
    SSIM,
    IdenticalFrames,
    PSNRMean,
)
from lightning_kv.metrics.functional import ms_ssim, pooled_psnr, psnr, ssim

OF_FRAMES = [PSNR, PSNRMean, SSIM, IdenticalFrames]


def random_pair(seed: int, frames: int = 6, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        torch.rand(2, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))
    )


def constant(*levels: float) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 24, 24)


def test_psnr_closed_forms():
    got = psnr(constant(0.1, 1.0, 0.4), constant(0.0, 0.0, 0.4))
    assert got.tolist() == pytest.approx([20.0, 0.0, 100.0], abs=1e-5)
    assert got.dtype == torch.float64


def test_psnr_of_every_frame_is_that_of_torchmetrics():
    preds, target = random_pair(0)
    expected = [
        peak_signal_noise_ratio(a.double(), b.double(), data_range=1.0).item()
        for a, b in zip(preds, target, strict=True)
    ]
    # torchmetrics takes its logarithm of ten in float32.
    assert psnr(preds, target).tolist() == pytest.approx(expected, rel=1e-7)


def test_psnr_averages_errors_and_its_mean_decibels():
    # Frames with MSE 1e-4 and 1e-2: 30 dB as a mean over frames, 22.97 dB if pooled.
    preds, target = constant(0.01, 0.1)[None], constant(0.0, 0.0)[None]
    mean, pooled = PSNRMean(curves=True), PSNR(curves=True)
    for metric, expected in ((mean, 30.0), (pooled, 22.967086218813)):
        metric.update(preds, target)
        assert metric.compute().item() == pytest.approx(expected, abs=1e-5)
        assert metric.curves[0].tolist() == pytest.approx([40.0, 20.0], abs=1e-5)


def test_psnr_is_that_of_torchmetrics_over_a_clip():
    preds, target = random_pair(11)
    expected = peak_signal_noise_ratio(preds.double(), target.double(), data_range=1.0)
    metric = PSNR()
    metric.update(preds[None], target[None])
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-7)
    curve = metric.curve(preds, target)
    curve[:2] = torch.nan
    expected = peak_signal_noise_ratio(preds[2:].double(), target[2:].double(), data_range=1.0)
    assert metric.value(curve) == pytest.approx(expected.item(), rel=1e-7)


def test_psnr_pools_the_pixel_frames_of_a_latent_frame():
    errors = torch.tensor([[0.01, 0.1, 0.1, 0.01], [0.1, 0.1, 0.1, 0.1]])
    values = -20 * errors.log10()
    expected = [-10 * math.log10((1e-2 + 1e-2 + 1e-4 + 1e-4) / 4), 20.0]
    assert PSNR().pooled(values).tolist() == pytest.approx(expected, abs=1e-5)
    assert PSNRMean().pooled(values).tolist() == pytest.approx([30.0, 20.0], abs=1e-5)
    nothing = torch.full((2, 3), torch.nan)
    assert pooled_psnr(nothing).isnan().all() and PSNR().value(nothing[0]) is None


def test_identical_frames_are_those_at_the_cap():
    preds, target = constant(0.5, 0.5, 0.5, 0.50002), constant(*[0.5] * 4)
    assert IdenticalFrames().curve(preds, target).tolist() == [1, 1, 1, 0]
    *capped, other = PSNR().curve(preds, target).tolist()
    assert capped == pytest.approx([100] * 3, rel=1e-12) and other < 99.99


def test_ssim_closed_forms():
    got = ssim(constant(0.0, 0.25, 0.3), constant(1.0, 0.75, 0.3))
    assert got.tolist() == pytest.approx([9.99900009999e-05, 0.6000639897616381, 1.0], rel=1e-9)


def test_ssim_of_every_frame_is_that_of_a_plain_gaussian_window():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 3, 20, 24, generator=generator).double()
    offsets = torch.arange(-5, 6).double()
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def blur(image):
        padded = torch.nn.functional.pad(image.unsqueeze(0), (5, 5, 5, 5), mode="reflect")[0]
        return (padded.unfold(1, 11, 1).unfold(2, 11, 1) * window).sum((-2, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    expected = (luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)).mean().item()
    assert ssim(a.unsqueeze(0), b.unsqueeze(0)).item() == pytest.approx(expected, rel=1e-9)


def test_ssim_does_not_depend_on_how_frames_are_grouped():
    a, b = random_pair(2, frames=19)
    expected = structural_similarity_index_measure(
        a.double(), b.double(), reduction="none", data_range=1.0
    )
    got = ssim(a, b)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert ssim(a[:1], b[:1]).shape == (1,)
    assert ssim(a[:9], b[:9]).tolist() == pytest.approx(expected[:9].tolist(), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(6, 150),
    width=st.integers(6, 150),
    offset=st.floats(0, 1),
    contrast=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    noise=st.sampled_from([0.0, 1e-3, 0.3]),
    seed=st.integers(0, 99),
)
def test_ssim_is_that_of_torchmetrics_at_any_size(height, width, offset, contrast, noise, seed):
    # Flat pictures are the hard ones: their variance is a difference of almost equal numbers.
    generator = torch.Generator().manual_seed(seed)
    a, error = torch.rand(2, 2, 3, height, width, generator=generator).double()
    a = offset + contrast * (a - 0.5)
    b = (a + noise * (error - 0.5)).clamp(0, 1)
    expected = structural_similarity_index_measure(
        a.clamp(0, 1), b, reduction="none", data_range=1.0
    )
    torch.testing.assert_close(ssim(a.clamp(0, 1), b), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "noise"), [((176, 201), 0.02), ((193, 176), 1.0)])
def test_ms_ssim_is_that_of_torchmetrics(size, noise):
    generator = torch.Generator().manual_seed(8)
    a, error = torch.rand(2, 2, 3, *size, generator=generator)
    b = (a + noise * (error - 0.5)).clamp(0, 1)
    expected = multiscale_structural_similarity_index_measure(
        a.double(), b.double(), reduction="none", data_range=1.0, normalize="relu"
    )
    # torchmetrics rounds the exponents to float32.
    torch.testing.assert_close(ms_ssim(a, b), expected, rtol=0, atol=1e-7)


def test_ms_ssim_closed_forms():
    a, b, same = torch.tensor([0.25, 0.75, 0.3]).view(3, 1, 1, 1).expand(3, 3, 161, 161)[:, None]
    luminance = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ms_ssim(a, b).item() == pytest.approx(luminance**0.1333, rel=1e-10)
    # Weights of a window add up to 1 only in exact numbers: some 2e-15 may be missing.
    assert ms_ssim(same, same).tolist() == pytest.approx([1.0], rel=1e-13)
    assert ms_ssim(same, 1.001 * same).item() < 1 - 1e-8


def test_a_scale_of_negative_similarity_counts_as_nothing():
    generator = torch.Generator().manual_seed(9)
    a = torch.rand(1, 3, 176, 176, generator=generator)
    assert ssim(a, 1 - a).item() < 0
    assert ms_ssim(a, 1 - a).tolist() == [0.0]


def test_ssim_and_ms_ssim_of_every_frame_are_its_own_in_any_dtype():
    generator = torch.Generator().manual_seed(10)
    a, b = torch.rand(2, 3, 3, 176, 177, generator=generator).half()
    for measure in (ssim, ms_ssim, psnr):
        together = measure(a, b)
        alone = torch.cat([measure(x[None], y[None]) for x, y in zip(a, b, strict=True)])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
        torch.testing.assert_close(measure(a.double(), b.double()), together, rtol=1e-12, atol=0)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_a_curve_does_not_depend_on_how_a_clip_is_cut(cuts):
    metrics = {metric.name: metric() for metric in OF_FRAMES}
    a, b = torch.rand(2, sum(cuts), 3, 24, 20, generator=torch.Generator().manual_seed(12))
    blocks = list(zip(a.split(cuts), b.split(cuts), strict=True))
    for name, curve in read_clip(metrics, blocks).items():
        whole = read_clip(metrics, [(a, b)])[name]
        torch.testing.assert_close(curve, whole, rtol=1e-12, atol=0)


def test_blocks_of_ms_ssim_give_the_same_curve():
    a, b = torch.rand(2, 3, 3, 164, 161, generator=torch.Generator().manual_seed(13))
    blocks = [(a[:1], b[:1]), (a[1:], b[1:])]
    curve = read_clip({"": MSSSIM()}, blocks)[""]
    torch.testing.assert_close(curve, ms_ssim(a, b), rtol=1e-12, atol=0)


@pytest.mark.parametrize("metric", OF_FRAMES)
def test_metric_is_the_mean_over_clips_and_merges(metric):
    # Clips of different length weigh the same; shards may be uneven, and one may be empty.
    clips = [random_pair(seed, frames=3 + seed) for seed in range(5)]
    whole, shards = metric(), [metric(), metric(), metric()]
    whole.update([a for a, _ in clips], [b for _, b in clips])
    shards[0].update(*([x] for x in clips[0]))
    for a, b in clips[1:]:
        shards[2].update(a[None], b[None])
    for shard in shards[1:]:
        shards[0].merge_state(shard)
    expected = sum(metric().value(metric().curve(*clip)) for clip in clips) / 5
    assert whole.compute().item() == pytest.approx(expected, rel=1e-12)
    assert shards[0].compute().item() == pytest.approx(expected, rel=1e-12)
    assert whole.compute().dtype == torch.float64


def test_every_metric_says_what_it_is():
    for name, metric in METRICS.items():
        assert issubclass(metric, ClipMetric)
        assert metric.name == name
        assert isinstance(metric.unit, str)
        assert metric.higher_is_better in (True, False, None)
        assert metric.full_state_update is False
    # Those that look through a network add its recipe to theirs.
    own = [metric.recipe for metric in METRICS.values() if not hasattr(metric, "backbones")]
    assert len(set(own)) == len(own)


PIXELS = torch.rand(4, 3, 32, 32)
BROKEN = PIXELS.clone()
BROKEN[3, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("call", "given", "remedy"),
    [
        (lambda: psnr(PIXELS, PIXELS[:3]), "(3, 3, 32, 32)", "same shape"),
        (lambda: psnr(PIXELS * 2 - 1, PIXELS), "from -", "[0, 1]"),
        (lambda: ssim((PIXELS * 255).byte(), PIXELS), "uint8", "255"),
        (lambda: psnr(BROKEN, PIXELS), "nan", "[0, 1]"),
        (lambda: PSNR().curve(PIXELS), "target is missing", "leave"),
        (lambda: ms_ssim(PIXELS, PIXELS), "32 x 32", "more than 160"),
        (lambda: ms_ssim(*torch.rand(2, 1, 3, 200, 160)), "200 x 160", "more than 160"),
        (lambda: ssim(*torch.rand(2, 1, 3, 5, 9)), "5 x 9", "more than 5"),
    ],
)
def test_errors_say_what_was_given_and_what_would_work(call, given, remedy):
    with pytest.raises(ValueError) as error:
        call()
    assert given in str(error.value)
    assert remedy in str(error.value)
