"""Intervals over few prompts: what they can be at most, against draws, and who says so."""

import numpy as np
import pytest

from lightning_kv.runs.intervals import interval_note
from lightning_kv.runs.verdict import FILES, verdict
from lightning_kv.stats.bootstrap import bca_interval, coverage_limit

SHORT = {2: "50 %", 3: "75 %", 4: "88 %", 5: "94 %"}


def summary(*counts, width=1.0, **more):
    """One policy with a metric for each of these numbers of prompts."""
    ends = [0.5, 0.5 + width]
    metrics = {f"m{n}": {"n": n, "ci95": ends, "paired": None} for n in counts}
    return {"policies": {"a": {"metrics": metrics} | more}}


@pytest.mark.parametrize("n", SHORT)
@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_no_interval_of_few_values_holds_the_mean_more_often_than_is_said(n, kind):
    """Drawn 20 000 times: the whole range of the data, which no interval of it can leave."""
    rng = np.random.default_rng(n)
    data = getattr(rng, kind)(size=(20_000, n))
    mean = {"normal": 0.0, "exponential": 1.0}[kind]
    within = np.mean((data.min(1) <= mean) & (mean <= data.max(1)))
    if kind == "normal":  # a value is as likely below the mean as above: the limit itself
        assert within == pytest.approx(coverage_limit(n), abs=0.01)
    assert within <= coverage_limit(n) + 0.01
    for values in data[:50]:
        low, high = bca_interval(values, resamples=500)
        assert values.min() <= low <= high <= values.max()
    assert f"{100 * coverage_limit(n):.0f} %" == SHORT[n]


def test_the_sentence_names_every_number_of_prompts_once():
    found = interval_note([summary(3, 8), summary(3, 4)])
    assert found.endswith("in at most 75 % with 3, at most 88 % with 4 prompts.")


@pytest.mark.parametrize("n", [0, 1, 6, 48])
def test_where_nothing_is_short_nothing_is_said(n):
    assert interval_note([summary(n)]) == ""
    assert interval_note([summary(3, width=0.0)]) == "", "all values are equal"


def test_differences_and_drift_have_intervals_too():
    ends = {"n": 4, "ci95": [0.0, 1.0]}
    paired = summary(8)
    paired["policies"]["a"]["metrics"]["m8"]["paired"] = ends
    drift = summary(8, drift={"m8": {"start_end": ends, "paired": None}})
    assert interval_note([paired]) == interval_note([drift]) != ""


@pytest.mark.parametrize(
    ("n", "said"),
    [(3, "(interval 0.5 to 1.5, sure to at most 75 %)"), (8, "(95 % interval 0.5 to 1.5)")],
)
def test_the_sentence_about_drift(n, said):
    metric = {"mean": 30.0, "n": n, "against_reference": True, "paired": None, "ci95": None}
    drift = {"psnr": {"start_end": {"mean": 1.0, "ci95": [0.5, 1.5], "n": n}}}
    found = {
        "model": {"name": FILES},
        "reference": "full",
        "policies": {
            "full": {},
            "a": {"metrics": {"psnr": metric | {"unit": "dB", "sets": False}}, "drift": drift},
        },
        "family": {"level": 0.05, "tests": 0, "prompts": 0, "prompts_needed": 6},
    }
    assert verdict(found, [])[-1].endswith(f"15 % of the frames {said}.")
