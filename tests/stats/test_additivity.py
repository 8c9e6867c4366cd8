"""Adding up against least squares by hand, and on losses that do and do not add."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from lightning_kv.stats.additivity import additivity


def test_the_line_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    predicted = rng.lognormal(0, 1, 60)
    true = 0.7 * predicted**1.1 * np.exp(rng.normal(0, 0.2, 60))
    found = additivity(true, predicted)
    design = np.stack([np.ones(60), np.log(predicted)], 1)
    (intercept, slope), *_ = np.linalg.lstsq(design, np.log(true), rcond=None)
    off = np.log(true) - design @ [intercept, slope]
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept), rel=1e-9)
    assert found.fit == pytest.approx(1 - off.var() / np.log(true).var(), rel=1e-9)
    assert found.worst == np.argmax(abs(off))
    assert found.worst_factor == pytest.approx(np.exp(off[found.worst]), rel=1e-9)
    assert found.holds and found.words.endswith("Curves may be added.")
    assert json.loads(json.dumps(asdict(found)))["tables"] == 60


@pytest.mark.parametrize(
    ("slope", "holds"),
    [(0.79, False), (0.81, True), (1.0, True), (1.24, True), (1.26, False), (-1.0, False)],
)
def test_the_slope_decides(slope, holds):
    x = np.geomspace(0.01, 1, 20)
    found = additivity(3 * x**slope, x)
    assert found.holds == holds
    assert ("slope is not in [0.8, 1.25]" in found.words) != holds
    assert ("a guide" in found.words) != holds


def test_the_scatter_decides():
    rng = np.random.default_rng(1)
    x = rng.lognormal(0, 1, 2000)
    for noise, holds in ((0.45, True), (0.55, False)):  # R² = 1 / (1 + noise²): 0.83 and 0.77
        found = additivity(x * np.exp(rng.normal(0, noise, 2000)), x)
        assert found.fit == pytest.approx(1 / (1 + noise**2), abs=0.03)
        assert found.holds == holds
        assert ("explains less than 80 %" in found.words) != holds


def test_the_worst_table_is_named_with_its_sign():
    x = np.geomspace(0.01, 1, 20)
    true = x.copy()
    true[7] /= 3
    found = additivity(true, x)
    assert found.worst == 7 and found.worst_factor == pytest.approx(1 / 3, rel=0.1)


def test_losses_that_are_all_the_same_are_no_proof():
    same = additivity([1.0, 2.0, 3.0], [0.1] * 3)
    assert (same.slope, same.fit, same.holds) == (None, None, False)
    assert "tables of different totals" in same.words
    flat = additivity([0.3] * 4, [1.0, 2.0, 3.0, 4.0])
    assert (flat.slope, flat.fit, flat.holds) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("true", "predicted", "said"),
    [
        ([1.0, 2.0], [1.0, 2.0], "3 tables or more"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], "3 true and 2 predicted"),
        ([1.0, 0.0, 3.0], [1.0, 2.0, 3.0], "the true loss of table 1 is 0"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, np.inf], "finite"),
    ],
)
def test_bad_input_is_refused(true, predicted, said):
    with pytest.raises(ValueError, match=said):
        additivity(true, predicted)


def test_tables_are_compared_within_their_group():
    """A level that goes with the group is no merit of the predictions."""
    predicted = [1.0, 2.0, 3.0, 101.0, 102.0, 103.0]
    true = [3.0, 2.0, 1.0, 303.0, 302.0, 301.0]
    assert additivity(true, predicted).fit > 0.9
    found = additivity(true, predicted, [6, 6, 6, 9, 9, 9])
    x, y = (
        np.concatenate(
            [np.log(own[:3]) - np.log(own[:3]).mean(), np.log(own[3:]) - np.log(own[3:]).mean()]
        )
        for own in (np.array(predicted), np.array(true))
    )
    assert found.slope == pytest.approx(np.polyfit(x, y, 1)[0]) and found.slope < 0
    assert not found.holds and "each against those of its mean" in found.words
