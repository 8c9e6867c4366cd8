"""Scores on held-out prompts: differences in place of ratios, against signs flipped one by one."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest

from lightning_kv.stats.bootstrap import bca_interval
from lightning_kv.stats.inference import holm
from lightning_kv.stats.score_proof import prove_score

SHUFFLES = ["shuffled-1", "shuffled-2", "shuffled-3"]


def scores(rng, prompts, spread=0.02, **gains):
    """A share of each prompt under conditions that lose so much against ``optimal``."""
    base = rng.uniform(0.3, 0.9, prompts)
    rows = {"optimal": base} | {name.replace("_", "-"): base - by for name, by in gains.items()}
    return {
        name: {f"p{n}": [float(x), float(x)] for n, x in enumerate(own + noise)}
        for name, own in rows.items()
        for noise in [rng.normal(0, spread, prompts)]
    }


def flipped(values):
    """The share of all sign patterns whose mean is as far from 0."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    return float((np.abs((signs * values).mean(1)) >= abs(np.mean(values)) - 1e-12).mean())


def test_figures_are_those_of_the_differences():
    values = scores(np.random.default_rng(0), 10, uniform=0.05, dynamic=0.01)
    found = prove_score(values)
    assert found.absent == ("pyramid", "focused-matched")
    ps = []
    for own in found.comparisons:
        gains = [
            values["optimal"][p][0] - values[own.against][p][0] for p in sorted(values["optimal"])
        ]
        assert own.gain == pytest.approx(np.mean(gains))
        assert own.p == pytest.approx(flipped(gains))
        low, high = bca_interval([-x for x in gains])
        assert (own.low, own.high) == pytest.approx((-high, -low))
        ps.append(own.p)
    assert found.adjusted == pytest.approx(holm(ps))
    assert json.loads(json.dumps(asdict(found)))["verdict"] == found.verdict


def test_of_losses_that_may_be_nothing_less_is_better():
    values = scores(np.random.default_rng(1), 10, uniform=-0.2)
    found = prove_score(values, higher_is_better=False, family=("uniform",))
    assert found.comparisons[0].gain > 0.15 and found.verdict == "optimal"
    zero = {name: {p: [0.0, 0.0] for p in own} for name, own in values.items()}
    assert prove_score(zero, False, family=("uniform",)).comparisons[0].p == 1


def test_large_scores_do_not_overflow():
    rng = np.random.default_rng(2)
    values = scores(rng, 9, uniform=0.1)
    far = {n: {p: [x + 5000 for x in own] for p, own in side.items()} for n, side in values.items()}
    own, other = (prove_score(v, family=("uniform",)).comparisons[0] for v in (values, far))
    assert own.gain == pytest.approx(other.gain, abs=1e-9) and own.p == other.p


@pytest.mark.parametrize(
    ("gain", "shuffle", "margin", "verdict", "said"),
    [
        (0.1, 0.1, 0.02, "optimal", "Which head gets which budget matters"),
        (0.1, 0.0, 0.02, "spread", "It is not shown that it matters which head"),
        (0.0, 0.0, 0.1, "uniform", "a gain of 0.1 is excluded"),
        (0.0, 0.0, None, "unclear", "Undecided"),
        (-0.1, 0.0, 0.02, "uniform", "Uniform is enough here"),
    ],
)
def test_verdicts(gain, shuffle, margin, verdict, said):
    gains = {"uniform": gain} | {name.replace("-", "_"): shuffle for name in SHUFFLES}
    values = scores(np.random.default_rng(3), 12, **gains)
    found = prove_score(values, shuffles=SHUFFLES, margin=margin)
    assert found.verdict == verdict and any(said in each for each in found.words)


def test_few_prompts_decide_nothing():
    found = prove_score(scores(np.random.default_rng(4), 4, uniform=0.3), family=("uniform",))
    assert found.verdict == "unclear" and "fewer than 6 prompts" in found.words[0]
    with pytest.raises(ValueError, match="family of comparisons is empty"):
        prove_score({}, family=())
