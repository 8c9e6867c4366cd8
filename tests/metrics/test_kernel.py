"""Kernel distances against double loops, torchmetrics and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.metrics.functional.kernel import (
    JEDI,
    KVD,
    PolynomialKernel,
    jedi_from_moments,
    kernel_distance,
    kernel_error,
    kernel_null,
)
from lightning_kv.metrics.functional.moments import Moments

X = torch.arange(1.0, 10).reshape(3, 3)
Y = torch.tensor([[7.0, 6, 5], [4, 3, 2], [1, 1, 8], [0, 2, 5]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(x, y, degree, coef0, estimator):
    """MMD² by its definition, pair by pair."""

    def mean(a, b, same):
        pairs = [
            (float(p @ q) / len(p) + coef0) ** degree
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and i == j and estimator == "u")
        ]
        return sum(pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def streamed(x, y, estimator):
    sides = (sum((Moments.of(part) for part in z.split(2)), Moments.of(z[:0])) for z in (x, y))
    return jedi_from_moments(*sides, estimator).item()


@pytest.mark.parametrize(
    ("estimator", "value"), [("v", 270.7222222222222), ("u", -122.57407407407413)]
)
def test_the_anchors(estimator, value):
    plain = PolynomialKernel(degree=2, coef0=0.0, scale=1.0)
    assert kernel_distance(X, Y, plain, estimator).item() == pytest.approx(value, rel=1e-14)
    assert kernel_distance(X, Y, JEDI, estimator).item() == pytest.approx(100 * value, rel=1e-14)
    assert streamed(X, Y, estimator) == pytest.approx(100 * value, rel=1e-14)


@given(
    n=st.integers(2, 6),
    m=st.integers(2, 6),
    d=st.integers(1, 5),
    seed=st.integers(0, 999),
    estimator=st.sampled_from("uv"),
)
@settings(max_examples=30, deadline=None)
def test_both_forms_are_what_a_double_loop_says(n, m, d, seed, estimator):
    x, y = draw(n, d, seed=seed), draw(m, d, seed=seed + 1000) + 0.5
    kvd = slow(x, y, 3, 1.0, estimator)
    assert kernel_distance(x, y, KVD, estimator).item() == pytest.approx(kvd, rel=1e-9, abs=1e-9)
    jedi = pytest.approx(100 * slow(x, y, 2, 0.0, estimator), rel=1e-9, abs=1e-9)
    assert kernel_distance(x, y, JEDI, estimator).item() == jedi
    assert streamed(x, y, estimator) == jedi


def test_torchmetrics_says_the_same_of_kid():
    from torchmetrics.image.kid import poly_mmd

    x, y = draw(20, 7), draw(20, 7, seed=1) + 0.3
    assert kernel_distance(x, y).item() == pytest.approx(poly_mmd(x, y).item(), rel=1e-9)


def test_blocks_change_nothing(monkeypatch):
    x, y = draw(50, 7), draw(30, 7, seed=1)
    whole = kernel_distance(x, y)
    monkeypatch.setattr("lightning_kv.metrics.functional.kernel.BLOCK", 100)
    assert kernel_distance(x, y).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize(("n", "expected"), [(16, 12.6), (64, 3.1), (256, 0.78), (1024, 0.20)])
def test_the_null_of_jedi_at_its_width(n, expected):
    """``(1/n + 1/n) (E|x|⁴ - E(x·x')²) / d²``, times 100: (2/n) (1 + 1/d) for normal features."""
    real, generated = draw(2, n, 1280)
    exact = 100 * (2 / n) * (1 + 1 / 1280)
    null = kernel_null(real, n, JEDI, "v")
    assert exact == pytest.approx(expected, rel=0.03)
    assert null == pytest.approx(exact, rel=0.06)
    assert kernel_distance(generated, real, JEDI, "v").item() == pytest.approx(null, rel=0.1)
    assert abs(kernel_distance(generated, real, JEDI, "u").item()) < 0.08 * null + 0.004


def test_the_null_is_the_mean_over_pairs_of_sets():
    for kernel in (JEDI, KVD):
        pairs = [(draw(12, 4, seed=s), draw(20, 4, seed=s + 999)) for s in range(300)]
        values = [kernel_distance(x, y, kernel, "v").item() for x, y in pairs]
        nulls = [kernel_null(y, 12, kernel, "v") for _, y in pairs]
        assert np.mean(nulls) == pytest.approx(np.mean(values), rel=0.06)
        unbiased = [kernel_distance(x, y, kernel, "u").item() for x, y in pairs]
        assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / math.sqrt(300)
    assert kernel_null(pairs[0][0], 12, JEDI, "v") == pytest.approx(
        kernel_null(Moments.of(pairs[0][0]), 12, JEDI, "v"), rel=1e-12
    )


@pytest.mark.parametrize("estimator", ["u", "v"])
@pytest.mark.parametrize("kernel", [JEDI, KVD])
def test_the_standard_error_leaves_out_one_by_one(kernel, estimator):
    x, y = draw(9, 4), draw(12, 4, seed=1) + 0.5
    left = [
        kernel_distance(torch.cat([x[:i], x[i + 1 :]]), y, kernel, estimator).item()
        for i in range(9)
    ]
    expected = math.sqrt(8 * np.var(left))
    assert kernel_error(x, y, kernel, estimator) == pytest.approx(expected, rel=1e-9)
    assert kernel_error(x[:2], y, kernel, estimator) is None


def alike(prompts, seed, windows=4, d=4, spread=0.3):
    """Clips of which some are of one prompt, and their prompts."""
    centres = draw(prompts, d, seed=seed).repeat_interleave(windows, 0)
    groups = torch.arange(prompts).repeat_interleave(windows)
    return centres + spread * draw(prompts * windows, d, seed=seed + 5000), groups


@pytest.mark.parametrize("estimator", ["u", "v"])
@pytest.mark.parametrize("kernel", [JEDI, KVD])
def test_the_null_of_clips_that_are_alike(kernel, estimator):
    pairs = [(alike(8, s)[0], alike(12, s + 999)) for s in range(300)]
    values = [kernel_distance(x, y, kernel, estimator).item() for x, (y, _) in pairs]
    nulls = [kernel_null(y, 8, kernel, estimator, groups) for _, (y, groups) in pairs]
    off = np.std(np.subtract(values, nulls)) / math.sqrt(300)
    assert np.mean(nulls) == pytest.approx(np.mean(values), abs=4 * off)
    assert np.mean(nulls) > 10 * off  # so it tells the null from zero


@pytest.mark.parametrize("estimator", ["u", "v"])
@pytest.mark.parametrize("kernel", [JEDI, KVD])
def test_the_standard_error_leaves_out_whole_prompts(kernel, estimator):
    x, y = draw(9, 4), draw(12, 4, seed=1) + 0.5
    groups = torch.tensor([7, 3, 3, 9, 7, 3, 9, 1, 9])
    left = [
        kernel_distance(x[groups != group], y, kernel, estimator).item() for group in (1, 3, 7, 9)
    ]
    expected = math.sqrt(3 * np.var(left))
    assert kernel_error(x, y, kernel, estimator, groups) == pytest.approx(expected, rel=1e-9)
    assert kernel_error(x, y, kernel, estimator, groups % 2) is None
    assert kernel_null(x, 5, kernel, estimator, groups % 2) is None
    with pytest.raises(ValueError, match="units do not fit 9 clips"):
        kernel_error(x, y, kernel, estimator, groups[:8])
    with pytest.raises(ValueError, match="do not say which are of one prompt"):
        kernel_null(Moments.of(x), 5, JEDI, estimator, groups)


def test_a_set_is_at_distance_zero_from_itself():
    for kernel in (JEDI, KVD):
        assert kernel_distance(X, X, kernel, "v").item() == pytest.approx(0, abs=1e-9)


def test_what_makes_no_distance_is_refused():
    with pytest.raises(ValueError, match="no estimator 'w'"):
        kernel_distance(X, Y, estimator="w")
    with pytest.raises(ValueError, match="differ in width"):
        kernel_distance(X, Y[:, :2])
    with pytest.raises(ValueError, match="differ in width"):
        jedi_from_moments(Moments.of(X), Moments.of(Y[:, :2]))
    for bad, words in ((X / 0, "3 of 3 clips"), (X[:1], "set of 1 clips")):
        for sets in ((bad, Y), (Y, bad)):
            with pytest.raises(ValueError, match=words):
                kernel_distance(*sets)
    with pytest.raises(ValueError, match="set of 1 clips"):
        jedi_from_moments(Moments.of(X[:1]), Moments.of(Y))
