"""Distances of latents against plain loops and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.metrics.base import Clip, clip_value
from lightning_kv.metrics.latents import (
    LatentCosine,
    LatentMSE,
    LatentRelative,
    LatentShift,
    LatentSNR,
    channel_shift,
    latent_cosine,
    latent_mse,
    latent_relative,
    latent_shift,
    latent_snr,
)

ALL = [LatentMSE, LatentRelative, LatentCosine, LatentSNR, LatentShift]


def random_pair(seed: int, frames: int = 5, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, frames, 16, 4, 6, generator=generator)
    return b + scale * a, b


def rows(tensor):
    return tensor.flatten(1).double().tolist()


def test_latent_mse_is_the_plain_loop():
    a, b = random_pair(3)
    expected = [
        math.fsum((x - y) ** 2 for x, y in zip(p, q, strict=True)) / (16 * 24)
        for p, q in zip(rows(a), rows(b), strict=True)
    ]
    assert latent_mse(a, b).tolist() == pytest.approx(expected, rel=1e-12)


def test_relative_error_cosine_and_snr_are_those_of_plain_loops():
    a, b = random_pair(4, scale=0.3)
    for index, (p, q) in enumerate(zip(rows(a), rows(b), strict=True)):
        error = math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(p, q, strict=True)))
        lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in (p, q)]
        dot = math.fsum(x * y for x, y in zip(p, q, strict=True))
        assert latent_relative(a, b)[index].item() == pytest.approx(error / lengths[1], rel=1e-12)
        assert latent_cosine(a, b)[index].item() == pytest.approx(
            dot / lengths[0] / lengths[1], rel=1e-12
        )
        assert latent_snr(a, b)[index].item() == pytest.approx(
            20 * math.log10(lengths[1] / error), rel=1e-12
        )


def test_the_relative_error_looks_at_the_reference_and_not_at_the_rollout():
    ones = torch.ones(1, 16, 2, 2)
    assert latent_relative(3 * ones, ones).item() == pytest.approx(2)
    assert latent_relative(ones, 3 * ones).item() == pytest.approx(2 / 3)


def test_identical_latents_have_every_metric_at_its_identity():
    a, _ = random_pair(5)
    clip = Clip(a, reference_latents=a.clone())
    for metric in ALL:
        expected = [100.0 if metric is LatentSNR else metric.identical] * 5
        assert metric().curve(clip).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_frame_without_signal_has_no_value_and_does_not_count():
    a, b = random_pair(6, frames=3)
    b[1] = 0
    for metric in (LatentRelative, LatentCosine, LatentSNR):
        curve = metric().curve(Clip(a, reference_latents=b))
        assert curve.isnan().tolist() == [False, True, False]
        assert clip_value(curve) == pytest.approx((curve[0] + curve[2]).item() / 2)
    assert latent_cosine(b[1:2], a[1:2]).isnan().all()


def test_the_shift_of_channels_is_that_of_numpy():
    a, b = random_pair(7)
    means, deviations = channel_shift(a, b)
    x, y = a.double().numpy(), b.double().numpy()
    np.testing.assert_allclose(means, x.mean((2, 3)) - y.mean((2, 3)), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(deviations, x.std((2, 3)) - y.std((2, 3)), rtol=1e-9, atol=1e-14)
    expected = [
        math.sqrt(math.fsum(m * m + s * s for m, s in zip(ms, ss, strict=True)) / 16)
        for ms, ss in zip(means.tolist(), deviations.tolist(), strict=True)
    ]
    assert latent_shift(a, b).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_shift_of_colour_and_of_contrast_is_seen_and_one_in_space_is_not():
    _, b = random_pair(8)
    assert latent_shift(b + 0.25, b).tolist() == pytest.approx([0.25] * 5, rel=1e-5)
    centred = b - b.mean((2, 3), keepdim=True)
    expected = 0.5 * centred.double().square().mean((1, 2, 3)).sqrt()
    assert latent_shift(1.5 * centred, centred).tolist() == pytest.approx(
        expected.tolist(), rel=1e-5
    )
    assert latent_shift(b.roll(2, dims=3), b).tolist() == pytest.approx([0] * 5, abs=1e-9)
    assert (latent_mse(b.roll(2, dims=3), b) > 0.5).all()


@pytest.mark.parametrize("metric", ALL)
def test_context_does_not_count_and_shards_merge(metric):
    clips = [
        Clip(a, reference_latents=b, context=seed % 3)
        for seed in range(4)
        for a, b in [random_pair(seed, frames=4 + seed)]
    ]
    whole, left, right = metric(), metric(), metric()
    for index, clip in enumerate(clips):
        whole.update(clip)
        (left if index == 0 else right).update(clip)
    left.merge_state(right)
    values = []
    for seed, clip in enumerate(clips):
        full = metric.measure(clip.latents, clip.reference_latents)
        assert metric().curve(clip).isnan().sum() == seed % 3
        values.append(full[seed % 3 :].mean().item())
    assert whole.compute().item() == pytest.approx(sum(values) / 4, rel=1e-12)
    assert left.compute().item() == pytest.approx(sum(values) / 4, rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, 5), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_curve_does_not_depend_on_how_latents_are_cut(cut, dtype):
    a, b = (x.to(dtype) for x in random_pair(9, frames=6))
    for metric in ALL:
        whole = metric.measure(a, b)
        parts = [metric.measure(a[:cut], b[:cut]), metric.measure(a[cut:], b[cut:])]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("measure", [metric.measure for metric in ALL])
def test_shapes_must_agree(measure):
    a, b = random_pair(10)
    for other in (b[:3], b[0], b[:, :8]):
        with pytest.raises(ValueError, match=r"cannot be compared.*same shape"):
            measure(a, other)


def test_missing_latents_are_named():
    a, _ = random_pair(11)
    with pytest.raises(ValueError, match="without reference_latents"):
        LatentCosine().curve(Clip(a))
    with pytest.raises(ValueError, match="without latents"):
        LatentMSE().curve(Clip(pixels=torch.zeros(5, 3, 8, 8), reference_latents=a))
