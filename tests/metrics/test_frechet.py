"""Frechet distances against other routes, closed forms and drawn samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from lightning_kv.metrics.functional.frechet import (
    AgainstReal,
    frechet_distance,
    frechet_error,
    frechet_from_moments,
    frechet_infinity,
    null_distance,
)
from lightning_kv.metrics.functional.frechet_difference import delta_frechet
from lightning_kv.metrics.functional.moments import Moments


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spectrum(power, d=400):
    """Standard deviations: variances fall as ``k**-power`` and have the sum d."""
    variances = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    return (variances * d / variances.sum()).sqrt()


def by_product(x, y, root, ddof=1):
    """The distance from its formula, with one of the roots below."""
    mean = x.mean(0) - y.mean(0)
    first, second = (np.cov(z.numpy(), rowvar=False, ddof=ddof) for z in (x, y))
    return float(mean @ mean) + np.trace(first) + np.trace(second) - 2 * root(first @ second)


def by_sqrtm(product):
    return np.trace(sqrtm(product)).real


def by_eigenvalues(product):
    return np.sqrt(np.linalg.eigvals(product).astype(complex)).real.sum()


def exact(mean, covariance, n=64):
    """Features whose mean and unbiased covariance are exactly these."""
    covariance = torch.tensor(covariance, dtype=torch.float64)
    noise = draw(n, len(covariance))
    noise = torch.linalg.qr(noise - noise.mean(0)).Q * math.sqrt(n - 1)
    return noise @ torch.linalg.cholesky(covariance).T + torch.tensor(mean, dtype=torch.float64)


def both_routes(x, y, covariance="unbiased"):
    kept = frechet_distance(x, y, covariance).item()
    summed = frechet_from_moments(Moments.of(x), Moments.of(y), covariance).item()
    assert summed == pytest.approx(kept, rel=1e-6, abs=1e-4)
    return kept


@pytest.mark.parametrize("covariance", ["unbiased", "ml"])
@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 200), (30, 17)])
def test_all_routes_agree_where_it_is_well_conditioned(n, m, covariance):
    x, y = draw(n, 12), draw(m, 12, seed=1) * torch.linspace(0.5, 2, 12) + 0.3
    got, ddof = both_routes(x, y, covariance), int(covariance == "unbiased")
    assert got == pytest.approx(by_product(x, y, by_sqrtm, ddof), rel=1e-6)
    assert got == pytest.approx(by_product(x, y, by_eigenvalues, ddof), rel=1e-6)


def test_fewer_clips_than_features_agree_with_eigenvalues_of_the_product():
    x, y = draw(8, 40), draw(11, 40, seed=1) + 0.2
    assert both_routes(x, y) == pytest.approx(by_product(x, y, by_eigenvalues), rel=1e-5)


def test_torchmetrics_says_the_same():
    from torchmetrics.image.fid import _compute_fid

    x, y = draw(50, 10), draw(80, 10, seed=1) * 1.3
    other = _compute_fid(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T)).item()
    assert both_routes(x, y) == pytest.approx(other, rel=1e-9)


def test_diagonal_gaussians_have_their_closed_form():
    mean = np.array([0, 0.1, 0.2, 0.3, 0.4])
    x = exact(mean, np.diag([1.0, 2, 3, 4, 5]))
    y = exact(-mean, 2 * np.diag([5.0, 4, 3, 2, 1]))
    assert both_routes(x, y) == pytest.approx(9.065607985087912, rel=1e-12)


def test_covariances_that_do_not_commute_have_their_closed_form():
    x = exact([0, 0], [[2.0, 0.5], [0.5, 1.0]])
    y = exact([0, 0], [[1.0, -0.3], [-0.3, 3.0]])
    assert both_routes(x, y) == pytest.approx(0.9293118549677741, rel=1e-12)


@given(
    n=st.integers(3, 30),
    m=st.integers(3, 30),
    d=st.integers(1, 20),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_invariances(n, m, d, scale, seed):
    x, y = draw(n, d, seed=seed), draw(m, d, seed=seed + 1000) * 2
    value, size = frechet_distance(x, y), x.square().sum() / n + y.square().sum() / m
    turn, shift = torch.linalg.qr(draw(d, d, seed=seed)).Q, draw(d, seed=seed)

    def near(other, expected):
        return abs(other - expected) <= 1e-9 * (size + abs(expected))

    assert near(frechet_distance(y, x), value)
    assert near(frechet_distance(x + shift, y + shift), value)
    assert near(frechet_distance(x @ turn, y @ turn), value)
    assert near(frechet_distance(x * scale, y * scale) / scale**2, value)
    centred = frechet_distance(x - x.mean(0), y - y.mean(0) + shift)
    assert near(centred, frechet_distance(x - x.mean(0), y - y.mean(0)) + shift.square().sum())


def test_many_clips_that_span_few_dimensions():
    thin = draw(60, 3) @ draw(3, 12, seed=1)
    for x, y in ((thin, draw(60, 12, seed=2)), (thin, thin * 2 + 1)):
        assert both_routes(x, y) == pytest.approx(by_product(x, y, by_eigenvalues), rel=1e-6)


@pytest.mark.parametrize("n", [8, 400])
def test_a_set_is_at_distance_zero_from_itself(n):
    x = draw(n, 50) + 5
    assert frechet_distance(x, x).item() <= 1e-12 * x.var(0).sum()
    assert frechet_distance(x, x.flip(0)).item() <= 1e-12 * x.var(0).sum()
    moments = Moments.of(x)
    assert frechet_from_moments(moments, moments).item() <= 1e-6 * x.var(0).sum()


def test_float32_features_far_from_zero_lose_nothing():
    x, y = draw(64, 8, dtype=torch.float32) + 100, draw(64, 8, seed=1, dtype=torch.float32) + 100
    assert both_routes(x, y) == pytest.approx(
        by_product(x.double(), y.double(), by_eigenvalues), rel=1e-9
    )


def test_sums_that_lost_their_digits_are_refused():
    x = draw(200, 20)
    moments = Moments.of(x)
    loss = torch.zeros(20, 20, dtype=torch.float64)
    loss[0, 0] = 1000
    broken = Moments(200, moments.total, moments.outer - loss, moments.fourth)
    for sets in ((broken, moments), (moments, broken)):
        with pytest.raises(ValueError, match="lost their digits"):
            frechet_from_moments(*sets)


GOOD = draw(8, 3)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (GOOD.index_fill(0, torch.tensor(2), torch.nan), "1 of 8 clips"),
        (GOOD / 0, "8 of 8 clips"),
        (torch.full((8, 3), 0.1), "All 8 clips"),
        (GOOD[:1], "set of 1 clips"),
        (GOOD[:0], "set of 0 clips"),
        (GOOD[:, :2], "differ in width"),
        (GOOD.long(), "no features"),
        (GOOD[0], "no features"),
    ],
)
def test_what_makes_no_distance_is_refused(bad, words):
    for sets in ((bad, GOOD), (GOOD, bad)):
        with pytest.raises(ValueError, match=words):
            frechet_distance(*sets)
    with pytest.raises(ValueError, match="no covariance 'biased'"):
        frechet_distance(GOOD, GOOD, covariance="biased")


def test_constant_clips_are_refused_from_moments_too():
    constant = Moments.of(torch.full((50, 3), 0.1))
    with pytest.raises(ValueError, match="All 50 clips"):
        frechet_from_moments(Moments.of(GOOD), constant)
    with pytest.raises(ValueError, match="All 50 clips"):
        frechet_from_moments(constant, Moments.of(GOOD))


def test_moments_stream():
    x = draw(103, 12) + 100
    whole = Moments.of(x).covariance()
    parts = [Moments.of(part) for part in x.split([1, 50, 0, 52])]
    streamed = (parts[3] + parts[1]) + (parts[0] + parts[2])
    assert streamed.n == 103
    torch.testing.assert_close(streamed.covariance(), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole, torch.cov(x.T), rtol=1e-9, atol=1e-9)
    ml = streamed.covariance("ml")
    torch.testing.assert_close(ml, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-9)


def test_sums_in_float32_would_not_do():
    x = draw(2048, 400, dtype=torch.float32) * torch.linspace(0.5, 1.5, 400) + 100
    total, outer = torch.zeros(400), torch.zeros(400, 400)
    streamed = Moments.of(x[:0])
    for part in x.split(16):
        total, outer = total + part.sum(0), outer + part.T @ part
        streamed += Moments.of(part)
    single = (outer - torch.outer(total, total) / 2048) / 2047
    truth = torch.linalg.eigvalsh(torch.cov(x.double().T)).min()
    assert torch.linalg.eigvalsh(single).min() < 0 < truth
    assert torch.linalg.eigvalsh(streamed.covariance()).min() == pytest.approx(
        truth.item(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("power", "n", "truth", "off"),
    [(0, 16, 722, 0.12), (0, 128, 435, 0.08), (1, 64, 296, 0.12), (1, 128, 209, 0.12)],
)
def test_the_null_distance_is_what_two_samples_of_one_population_have(power, n, truth, off):
    """The truths are means over drawn pairs, of which the metric sees one set."""
    scale = spectrum(power)
    drawn = [frechet_distance(*draw(2, n, 400, seed=seed) * scale).item() for seed in range(4)]
    assert np.mean(drawn) == pytest.approx(truth, rel=0.03)
    nulls = [null_distance(draw(n, 400, seed=9 + seed) * scale, n) for seed in range(4)]
    assert np.mean(nulls) == pytest.approx(truth, rel=off)


def test_the_null_distance_of_few_clips_from_many():
    scale = spectrum(1, d=60)
    pairs = ((draw(24, 60, seed=s), draw(600, 60, seed=s + 99)) for s in range(8))
    drawn = np.mean([frechet_distance(x * scale, y * scale).item() for x, y in pairs])
    assert null_distance(draw(600, 60) * scale, 24) == pytest.approx(drawn, rel=0.06)


def test_the_null_distance_of_a_skewed_population_needs_no_gaussian():
    pairs = [draw(2, 100, 40, seed=seed).square() * spectrum(1, d=40) for seed in range(16)]
    drawn = np.mean([frechet_distance(*pair).item() for pair in pairs])
    assert np.mean([null_distance(x, 100) for x, _ in pairs]) == pytest.approx(drawn, rel=0.1)


def test_the_null_distance_is_seeded_and_may_be_unknown():
    real = draw(32, 8)
    assert null_distance(real, 32, seed=1) == null_distance(real, 32, seed=1)
    assert null_distance(real, 32, seed=1) != null_distance(real, 32, seed=2)
    assert null_distance(real[:4], 4) is None
    assert null_distance(real, 3000) is None
    doubled = torch.zeros(32, 8, dtype=torch.float64).index_fill(0, torch.tensor(0), 1.0)
    assert null_distance(doubled, 32) is None or null_distance(doubled, 32) > 0


def test_the_limit_is_near_zero_where_the_distance_is_all_bias():
    pairs = [draw(2, 400, 40, seed=seed) * spectrum(1, d=40) for seed in range(8)]
    values = [frechet_distance(*pair).item() for pair in pairs]
    limits = [frechet_infinity(*pair) for pair in pairs]
    assert abs(np.mean([limit.value for limit in limits])) < 0.06 * np.mean(values)
    assert max(limit.residual for limit in limits) < 0.1 * min(values)
    assert min(limit.residual for limit in limits) > 0
    x, y = pairs[0]
    assert frechet_infinity(x, y + 2).value == pytest.approx(4 * 40, rel=0.03)


def test_the_limit_is_refused_below_4_d():
    with pytest.raises(ValueError, match="Pass 40 clips or more"):
        frechet_infinity(draw(39, 10), draw(100, 10))


@pytest.mark.parametrize("n", [40, 150])
def test_the_standard_error_is_the_spread_over_draws(n):
    y = draw(200, 6, seed=7)
    values = [frechet_distance(draw(n, 6, seed=s) + 0.5, y).item() for s in range(200)]
    errors = [frechet_error(draw(n, 6, seed=s) + 0.5, y) for s in range(12)]
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.2)


def alike(prompts, seed, windows=4, d=16):
    """Clips of which four are of one prompt and nearly the same, and their prompts."""
    centres = draw(prompts, d, seed=seed).repeat_interleave(windows, 0)
    groups = torch.arange(prompts).repeat_interleave(windows)
    return centres + 0.1 * draw(prompts * windows, d, seed=seed + 5000), groups


def test_the_null_distance_and_the_error_of_clips_that_are_alike():
    """24 prompts of 4 clips each are worth 24 clips, not 96."""
    pairs = [(alike(24, seed), alike(24, seed + 999)) for seed in range(16)]
    truth = np.mean([frechet_distance(x, y).item() for (x, _), (y, _) in pairs])
    nulls = [null_distance(y, 24, units=groups) for _, (y, groups) in pairs]
    assert truth / 1.5 < np.mean(nulls) < truth * 1.5
    assert np.mean([null_distance(y, 96) for _, (y, _) in pairs]) < truth / 1.5
    real = draw(400, 16, seed=77)
    values = [frechet_distance(alike(24, seed)[0], real).item() for seed in range(200)]
    errors = [frechet_error(x, real, units=groups) for (x, groups), _ in pairs]
    assert np.std(values) / 1.5 < np.mean(errors) < np.std(values) * 1.5
    assert np.mean([frechet_error(x, real) for (x, _), _ in pairs]) < np.mean(errors) / 1.2


def test_whole_prompts_are_left_out():
    x, y = draw(9, 3), draw(20, 3, seed=1)
    groups = torch.tensor([7, 3, 3, 9, 7, 3, 9, 1, 9])
    left = [frechet_distance(x[groups != group], y).item() for group in (1, 3, 7, 9)]
    slow = math.sqrt(3 / 4 * sum((value - np.mean(left)) ** 2 for value in left))
    assert frechet_error(x, y, units=groups) == pytest.approx(slow, rel=1e-9)
    assert frechet_error(x, y, units=groups % 2) is None
    assert null_distance(x, 9, units=torch.arange(9)) == null_distance(x, 9)
    with pytest.raises(ValueError, match="units do not fit 9 clips"):
        null_distance(x, 9, units=groups[:8])
    with pytest.raises(ValueError, match="units do not fit 9 clips"):
        frechet_error(x, y, units=groups.int())


def test_the_standard_error_leaves_out_one_by_one():
    x, y = draw(9, 4), draw(20, 4, seed=1)
    left = [frechet_distance(torch.cat([x[:i], x[i + 1 :]]), y).item() for i in range(9)]
    slow = math.sqrt(8 / 9 * sum((value - np.mean(left)) ** 2 for value in left))
    assert frechet_error(x, y) == pytest.approx(slow, rel=1e-9)
    assert frechet_error(x[:2], y) is None


@pytest.mark.parametrize(("n", "m"), [(6, 5), (6, 40), (40, 6)])
def test_subsets_against_one_real_set_are_plain_distances(n, m):
    pool, real = draw(2 * n, 9), draw(m, 9, seed=1)
    distances = AgainstReal(pool, real, "unbiased")
    for seed in range(3):
        rows = torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))[:n]
        assert distances(rows).item() == pytest.approx(
            frechet_distance(pool[rows], real).item(), rel=1e-9
        )


def slow_p(x, y, real, groups):
    """The exact sign-flip test, by its definition."""
    observed = (frechet_distance(x, real) - frechet_distance(y, real)).item()
    extreme = []
    for code in range(2 ** (max(groups) + 1)):
        swap = torch.tensor([bool(code >> group & 1) for group in groups])[:, None]
        a, b = torch.where(swap, y, x), torch.where(swap, x, y)
        other = (frechet_distance(a, real) - frechet_distance(b, real)).item()
        extreme.append(abs(other) >= abs(observed) - 1e-9)
    return observed, np.mean(extreme)


@pytest.mark.parametrize("groups", [list(range(6)), [0, 0, 1, 1, 2, 3, 3, 4]])
def test_the_difference_is_tested_over_all_swaps_of_few_prompts(groups):
    n = len(groups)
    y, real = draw(n, 5), draw(12, 5, seed=1)
    x = y + 0.3 * draw(n, 5, seed=2)
    ids = torch.tensor(groups) * 7 + 3
    delta = delta_frechet(x, y, real, ids)
    observed, p = slow_p(x, y, real, groups)
    assert (delta.value, delta.p_value) == (pytest.approx(observed, rel=1e-9), pytest.approx(p))
    assert delta.value == delta.candidate - delta.reference
    left = [
        (frechet_distance(x[keep], real) - frechet_distance(y[keep], real)).item()
        for keep in (torch.tensor(groups) != group for group in set(groups))
    ]
    k = len(left)
    assert delta.prompts == k
    assert delta.standard_error == pytest.approx(math.sqrt((k - 1) * np.var(left)), rel=1e-6)


def test_a_difference_of_nothing_is_nothing():
    x, real = draw(12, 5), draw(20, 5, seed=1)
    delta = delta_frechet(x, x, real, permutations=50)
    assert (delta.value, delta.p_value, delta.standard_error) == (0.0, 1.0, 0.0)


def test_the_difference_keeps_a_true_null_and_finds_a_rescale():
    d, scale = 24, spectrum(1, d=24)
    p_values = []
    for seed in range(30):
        shared, real = draw(16, d, seed=seed), draw(40, d, seed=seed + 500) * scale
        x, y = (shared + 0.3 * draw(16, d, seed=seed + k) for k in (1000, 2000))
        p_values.append(delta_frechet(x * scale, y * scale, real, permutations=49).p_value)
    assert 0.35 < np.mean(p_values) < 0.65
    assert np.mean(np.array(p_values) <= 0.1) <= 0.25
    y, real = draw(64, d) * scale, draw(200, d, seed=1) * scale
    found = delta_frechet(y * 1.1, y, real, permutations=99)
    assert found.p_value == pytest.approx(1 / 100)
    assert abs(found.value) > 3 * found.standard_error


def test_sets_that_are_not_paired_are_refused():
    x, real = draw(6, 3), draw(9, 3, seed=1)
    with pytest.raises(ValueError, match="not paired"):
        delta_frechet(x, x[:5], real)
    with pytest.raises(ValueError, match="not paired"):
        delta_frechet(x, x, real, ids=torch.arange(5))
