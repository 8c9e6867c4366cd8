"""Distances of latents against plain loops and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.metrics.base import clip_value
from lightning_kv.metrics.functional import (
    channel_shift,
    divergence,
    latent_cosine,
    latent_mse,
    latent_relative,
    latent_shift,
    latent_snr,
)
from lightning_kv.metrics.latents import (
    DivergenceOnset,
    LatentCosine,
    LatentMSE,
    LatentRelative,
    LatentShift,
    LatentSNR,
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
    for metric in ALL:
        expected = [100.0 if metric is LatentSNR else metric.identical] * 5
        assert metric().curve(a, a.clone()).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_frame_without_signal_has_no_value_and_does_not_count():
    a, b = random_pair(6, frames=3)
    b[1] = 0
    for metric in (LatentRelative, LatentCosine, LatentSNR):
        curve = metric().curve(a, b)
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
def test_clips_of_any_length_weigh_the_same_and_shards_merge(metric):
    clips = [random_pair(seed, frames=4 + seed) for seed in range(4)]
    whole, left, right = metric(), metric(), metric()
    whole.update([a for a, _ in clips], [b for _, b in clips])
    left.update(*(x[None] for x in clips[0]))
    right.update([a for a, _ in clips[1:]], [b for _, b in clips[1:]])
    left.merge_state(right)
    expected = sum(metric.measure(a, b).mean().item() for a, b in clips) / 4
    assert whole.compute().item() == pytest.approx(expected, rel=1e-12)
    assert left.compute().item() == pytest.approx(expected, rel=1e-12)


def test_two_samples_that_have_nothing_in_common_are_at_a_divergence_of_one():
    a, b = torch.randn(2, 3, 16, 60, 60, generator=torch.Generator().manual_seed(0))
    assert divergence(a, b).tolist() == pytest.approx([1.0] * 3, abs=0.01)
    assert divergence(a, a).tolist() == [0.0] * 3


@pytest.mark.parametrize("given", [0, 2])
def test_the_onset_is_the_number_of_frames_after_the_given_ones(given):
    # |0.15 x| / |x| / sqrt 2 is 0.106, and that of 0.14 is 0.099.
    steps = [0.0] * given + [0.0, 0.02, 0.14, 0.15, 0.0, 1.0]
    target = torch.randn(len(steps), 16, 4, 4, generator=torch.Generator().manual_seed(1))
    preds = target * (1 + torch.tensor(steps)).view(-1, 1, 1, 1)
    metric = DivergenceOnset()
    curve = metric.curve(preds, target)
    assert curve.tolist() == pytest.approx([step / math.sqrt(2) for step in steps], abs=1e-6)
    curve[:given] = torch.nan
    assert metric.add(curve) == 3.0
    near = metric.curve(target * 1.1, target)
    near[:given] = torch.nan
    assert metric.add(near) == 6.0, "one that never leaves counts all its frames"
    target[given] = 0  # no distance: it neither diverges nor is left out of the count
    hidden = metric.curve(target * 1.1, target)
    assert metric.value(hidden[given + 1 :]) == 5.0
    assert metric.value(near * torch.nan) is None
    assert metric.compute().item() == 4.5 and metric.higher_is_better and metric.unit == "frames"


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


@pytest.mark.parametrize(
    ("preds", "target", "said"),
    [
        (torch.zeros(1, 2, 4, 3, 3), None, "target is missing"),
        (torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3), r"number 0 of preds is \(4, 3, 3\)"),
        (torch.zeros(1, 2, 4, 3, 3), torch.zeros(1, 3, 4, 3, 3), "cannot be compared frame by"),
        (torch.zeros(1, 2, 4, 3, 3), torch.zeros(2, 2, 4, 3, 3), "compared one with one"),
        (torch.zeros(1, 2, 4, 3, 3).long(), torch.zeros(1, 2, 4, 3, 3), "must be finite numbers"),
        (torch.zeros(1, 2, 4, 3, 3) / 0, torch.zeros(1, 2, 4, 3, 3), "must be finite numbers"),
        ([], [], "These are no latents"),
    ],
)
def test_what_are_no_latents_is_refused(preds, target, said):
    metric = LatentMSE()
    with pytest.raises(ValueError, match=said):
        metric.update(preds, target)
    assert not metric.values
