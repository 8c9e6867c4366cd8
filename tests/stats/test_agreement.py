"""The gate of a cheap measure: its sides, its reasons, and what it is made from."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from lightning_kv.stats.agreement import agreement, budget_ratios, gate
from lightning_kv.stats.reliability import Correlation, rank_correlation


def curves(rng, prompts=5, heads=24, budgets=(3, 6, 12), apart=0.0):
    """Falling curves, 0 at the last budget, of heads that differ; and another measure of them."""
    size = np.exp(rng.normal(0, 1, heads) + rng.normal(0, 0.1, (prompts, heads)))
    fall = 1 - np.array(budgets) / budgets[-1]
    exact = size[:, :, None] * fall
    return exact * np.exp(rng.normal(0, apart, (1, heads, 1))), exact


@pytest.mark.parametrize(
    ("low", "verdict", "said"),
    [
        (0.9, "gn", "0.9 or more, so Gauss-Newton is enough"),
        (
            0.89999,
            "screen",
            "at least 0.899 as far as 4 prompts can tell: below 0.9, so Gauss-Newton screens",
        ),
        (0.7, "screen", "heads near the threshold"),
        (0.699, "exact", "below 0.7, so only exact masking counts"),
        (-0.2, "exact", "at least -0.2 as far as 4 prompts can tell"),
    ],
)
def test_the_lower_bound_decides_and_the_estimate_does_not(low, verdict, said):
    found = gate(Correlation(4, 48, 0.95, 0.99, low, 1.0, ""))
    assert (found.verdict, found.bound) == (verdict, low)
    assert said in found.reason and "Across 48 heads" in found.reason


def test_without_a_bound_only_exact_masking_counts():
    found = gate(rank_correlation(np.arange(12.0).reshape(2, 6), np.arange(12.0).reshape(2, 6)))
    assert (found.verdict, found.bound) == ("exact", None)
    assert "2 prompts of the 3 that an interval needs" in found.reason


def test_ratios_are_those_of_means_over_prompts():
    rng = np.random.default_rng(0)
    cheap, exact = rng.exponential(1, (2, 4, 9, 2))
    found = budget_ratios(cheap, exact, (3, 6))
    for place, ratio in enumerate(found):
        gaps = [
            abs(np.log(cheap[:, m, place].mean() / exact[:, m, place].mean())) for m in range(9)
        ]
        assert ratio.median == pytest.approx(np.median(gaps), rel=1e-12)
        assert (ratio.heads, ratio.left_out) == (9, 0)
    doubled = budget_ratios(2 * exact, exact, (3, 6))[0].median
    assert doubled == budget_ratios(exact, 2 * exact, (3, 6))[0].median == pytest.approx(np.log(2))


def test_heads_without_loss_have_no_ratio():
    cheap = np.ones((3, 4, 2))
    cheap[:, 0, 0] = 1e-12
    cheap[:, :, 1] = 0.0
    first, last = budget_ratios(cheap, np.ones((3, 4, 2)), (3, 6), floor=1e-9)
    assert (first.median, first.heads, first.left_out) == (0.0, 3, 1)
    assert (last.median, last.heads, last.left_out) == (None, 0, 4)


def test_curves_must_fit_their_grid():
    with pytest.raises(ValueError, match=r"\[prompts, heads, budgets\] twice"):
        budget_ratios(np.ones((3, 4, 2)), np.ones((3, 4, 2)), (3, 6, 9))


def test_a_faithful_measure_passes_and_a_poor_one_does_not():
    rng = np.random.default_rng(1)
    good = agreement(*curves(rng, apart=0.05), budgets=(3, 6, 12), resamples=300)
    poor = agreement(*curves(rng, apart=3.0), budgets=(3, 6, 12), resamples=300)
    assert good.gate.verdict == "gn" and good.history == good.budgets[0]
    assert good.cheap.value > 0.95 and good.exact.value > 0.95
    assert good.corrected == pytest.approx(good.history.estimate, abs=0.05)
    assert poor.gate.verdict == "exact" and poor.history.estimate < 0.7
    # At the last budget nothing is lost: no head differs from another.
    assert good.budgets[-1].estimate is None and good.ratios[-1].left_out == 24
    assert json.loads(json.dumps(asdict(good)))["gate"]["verdict"] == "gn"
