"""The proof on held-out prompts: planted effects and none, the placebo, the family, the words."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import binomtest

from lightning_kv.stats.comparison import compare
from lightning_kv.stats.inference import holm, non_inferiority
from lightning_kv.stats.proof import fewest_prompts, keeps_quality, placebo, prove

SHUFFLES = [f"shuffled-{k}" for k in range(1, 6)]


def held_out(rng, prompts, spread=0.15, seeds=2, **changes):
    """Losses of conditions, each other than ``optimal`` by its change in logs, prompt by prompt.

    What a prompt makes of ``optimal`` is in all of its comparisons.
    """
    base = rng.normal(0, 1.5, (prompts, 1)) + rng.normal(0, 0.3, (prompts, seeds))
    own = rng.normal(0, spread / 2**0.5, (prompts, 1))
    logs = {"optimal": base + own}
    for name, change in changes.items():
        logs[name.replace("_", "-")] = base + change + rng.normal(0, spread / 2**0.5, (prompts, 1))
    return {
        name: {f"p{place:02d}": np.exp(row).tolist() for place, row in enumerate(rows)}
        for name, rows in logs.items()
    }


def shuffled(change):
    return {name.replace("-", "_"): change for name in SHUFFLES}


def test_a_planted_gain_is_proved_against_all_its_rivals():
    changes = dict(uniform=0.25, pyramid=0.3, focused_matched=0.2, dynamic=0.0, **shuffled(0.4))
    losses = held_out(np.random.default_rng(0), 24, **changes)
    found = prove(losses, shuffles=SHUFFLES)
    assert found.verdict == "optimal" and found.expected
    assert [c.against for c in found.comparisons] == [
        "uniform",
        "pyramid",
        "focused-matched",
        "dynamic",
    ]
    assert found.comparisons[0] == compare(losses, "optimal", "uniform")
    assert list(found.adjusted) == holm([c.p for c in found.comparisons])
    assert found.comparisons[0].ratio == pytest.approx(math.exp(-0.25), abs=0.06)
    assert found.placebo.holds and found.placebo.better == 5 and found.placebo.won > 0.9
    assert found.words[0].startswith("Optimal is better than uniform: optimal budgets change")
    assert any("Optimal cannot be told from dynamic" in word for word in found.words)
    assert any("Which head gets which budget matters" in word for word in found.words)
    assert json.loads(json.dumps(asdict(found)))["verdict"] == "optimal"


def test_uniform_is_enough_where_it_is():
    found = prove(
        held_out(np.random.default_rng(1), 32, uniform=0.0, **shuffled(0.0)), shuffles=SHUFFLES
    )
    assert found.verdict == "uniform" and not found.expected
    assert found.words[0].startswith("Uniform is enough here")
    assert "so a loss lower by 10 % is excluded" in found.words[0]
    assert found.absent == ("pyramid", "focused-matched", "dynamic")
    assert any("Not measured, so not compared with: pyramid" in word for word in found.words)
    assert not any("head gets which" in word for word in found.words)  # nothing to explain


def test_worse_than_uniform_is_also_enough():
    found = prove(held_out(np.random.default_rng(2), 32, uniform=-0.3))
    assert found.verdict == "uniform" and found.comparisons[0].ratio > 1.2


def test_what_is_neither_shown_nor_excluded_says_how_many_prompts_would():
    found = prove(held_out(np.random.default_rng(3), 10, spread=0.5, uniform=0.05))
    assert found.verdict == "unclear"
    needed = found.comparisons[0].needed
    assert needed > 10 and f"about {needed} prompts would show it" in found.words[0]


def test_too_few_prompts_prove_nothing_however_large_the_effect():
    for prompts in (1, 2, 7):
        losses = held_out(
            np.random.default_rng(4),
            prompts,
            0.01,
            uniform=2.0,
            pyramid=2.0,
            dynamic=2.0,
            focused_matched=2.0,
        )
        found = prove(losses)
        assert found.verdict == "unclear" and found.fewest == 8
        assert "No effect can be shown on fewer than 8 prompts" in found.words[0]
    none = prove(held_out(np.random.default_rng(5), 3, 0.01, uniform=0.0))
    assert none.verdict == "unclear"  # three that agree exclude nothing
    losses = held_out(
        np.random.default_rng(4),
        8,
        0.01,
        uniform=2.0,
        pyramid=2.0,
        dynamic=2.0,
        focused_matched=2.0,
    )
    assert prove(losses).verdict == "optimal"


def test_a_gain_of_the_spread_alone_is_said_to_be_that():
    found = prove(
        held_out(np.random.default_rng(6), 24, uniform=0.3, **shuffled(0.0)), shuffles=SHUFFLES
    )
    assert found.verdict == "spread" and not found.placebo.holds
    assert any("spread of budgets may have done the work" in word for word in found.words)
    open_ = prove(held_out(np.random.default_rng(6), 24, uniform=0.3))
    assert open_.verdict == "optimal" and open_.placebo is None
    assert any("No shuffled budgets were measured" in word for word in open_.words)


def test_one_shuffle_that_does_as_well_breaks_the_placebo():
    changes = {**shuffled(0.4), "shuffled_3": -0.2}
    found = placebo(held_out(np.random.default_rng(7), 24, **changes), "optimal", SHUFFLES)
    assert found.better == 4 and found.p <= 0.05 and not found.holds


def test_pairs_of_one_shuffle_are_the_sign_test_of_scipy():
    losses = held_out(np.random.default_rng(8), 11, shuffled_1=0.05)
    found = placebo(losses, "optimal", ["shuffled-1"])
    wins = round(11 * found.won)
    assert found.p == pytest.approx(binomtest(wins, 11).pvalue, rel=1e-9)


def test_five_shuffles_of_a_prompt_are_not_five_prompts():
    """No effect, but what a prompt does to ``optimal`` is in all five pairs."""
    rng, clustered, naive = np.random.default_rng(9), [], []
    for _ in range(80):
        losses = {"optimal": dict(enumerate(rng.lognormal(0, 1, 12)))}
        losses |= {name: dict(enumerate(rng.lognormal(0, 0.3, 12))) for name in SHUFFLES}
        found = placebo(losses, "optimal", SHUFFLES)
        clustered.append(found.p <= 0.05)
        naive.append(binomtest(round(60 * found.won), 60).pvalue <= 0.05)
    assert np.mean(clustered) < 0.12 < 0.18 < np.mean(naive)


def test_shuffles_are_measured_on_the_same_prompts():
    losses = held_out(np.random.default_rng(10), 6, **shuffled(0.1))
    del losses["shuffled-2"]["p01"]
    with pytest.raises(ValueError, match="not all measured on the same prompts"):
        placebo(losses, "optimal", SHUFFLES)


def test_what_decides_must_be_measured():
    losses = held_out(np.random.default_rng(11), 6, pyramid=0.1)
    with pytest.raises(ValueError, match="nothing of 'uniform'"):
        prove(losses)
    with pytest.raises(ValueError, match="family of comparisons is empty"):
        prove(losses, family=())


def test_signed_ranks_that_differ_and_lost_prompts_are_said():
    # One prompt of fourteen shows a huge gain, the others a small loss.
    ratios = {f"p{k:02d}": 0.1 + 0.01 * k for k in range(13)} | {"wild": -5.0}
    losses = {
        "optimal": {p: math.exp(d) for p, d in ratios.items()} | {"only": 1.0},
        "uniform": dict.fromkeys(ratios, 1.0),
    }
    found = prove(losses)
    assert found.comparisons[0].p > 0.05 >= found.comparisons[0].wilcoxon
    assert "by signed ranks 0.013: a few prompts decide" in found.words[0]
    assert any("left out where one is missing: only." in word for word in found.words)


def test_other_conditions_are_beside_the_family():
    losses = held_out(np.random.default_rng(12), 12, uniform=0.1, proportional=0.05)
    found = prove(losses, others=["proportional"])
    assert found.others == (compare(losses, "optimal", "proportional"),)
    assert len(found.adjusted) == 1


@pytest.mark.parametrize(("higher", "sign"), [(True, 1), (False, -1)])
def test_quality_is_the_non_inferiority_of_means_over_seeds(higher, sign):
    rng = np.random.default_rng(13)
    own, other = rng.normal(0.6, 0.02, (2, 12, 3))
    values = {
        name: {f"p{k:02d}": row.tolist() for k, row in enumerate(rows)}
        for name, rows in (("optimal", own), ("uniform", other))
    }
    found = keeps_quality(values, "aesthetic", "optimal", "uniform", 0.02, higher)
    lost = sign * (other.mean(1) - own.mean(1))
    assert found.found == non_inferiority(lost.tolist(), 0.02)
    losses = held_out(rng, 12, uniform=0.1)
    words = prove(losses, quality=[found]).words
    assert any(word.startswith("Aesthetic is") and "uniform budgets" in word for word in words)


@pytest.mark.parametrize(
    ("gap", "verdict", "said"),
    [
        (0.0, "not worse", "is kept within 0.02 of"),
        (0.1, "worse", "is worse by more than 0.02 than"),
        (0.019, "unclear", "is not shown to keep within 0.02 of"),
    ],
)
def test_every_verdict_on_quality_has_its_words(gap, verdict, said):
    rng = np.random.default_rng(14)
    own = {f"p{k}": 0.5 + 0.01 * rng.normal() for k in range(12)}
    other = {prompt: value + gap + 0.01 * rng.normal() for prompt, value in own.items()}
    found = keeps_quality({"a": own, "b": other}, "imaging", "a", "b", 0.02)
    assert found.found.verdict == verdict
    losses = held_out(rng, 12, uniform=0.1)
    assert any(said in word for word in prove(losses, quality=[found]).words)


def test_the_fewest_prompts_are_those_of_the_exact_test():
    for tests in (1, 2, 4, 9):
        n = fewest_prompts(tests)
        assert tests * 2 / 2**n <= 0.05 < tests * 2 / 2 ** (n - 1)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [12, 32])
def test_a_family_without_effects_errs_in_one_of_twenty(prompts):
    rng, wrong = np.random.default_rng(prompts), []
    for _ in range(300):
        losses = held_out(rng, prompts, uniform=0.0, pyramid=0.0, focused_matched=0.0, dynamic=0.0)
        wrong.append(min(prove(losses).adjusted) <= 0.05)
    assert np.mean(wrong) < 0.08


@pytest.mark.slow
def test_what_the_verdicts_are_worth():
    """32 prompts, spread 0.15: a fifth is found, nothing is called nothing."""
    rng = np.random.default_rng(15)
    rivals = {"pyramid": 0.3, "focused_matched": 0.1, "dynamic": 0.0}
    gain, none = [], []
    for _ in range(60):
        gain.append(prove(held_out(rng, 32, uniform=0.2, **rivals)).verdict)
        none.append(prove(held_out(rng, 32, uniform=0.0, **rivals)).verdict)
    assert gain.count("optimal") >= 57
    assert none.count("uniform") >= 45 and none.count("optimal") <= 4
