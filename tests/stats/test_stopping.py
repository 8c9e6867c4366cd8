"""The stopping rule against loops by hand, and on worlds whose heads do and do not differ."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from lightning_kv.stats.bootstrap import bca_interval, resample_counts
from lightning_kv.stats.stopping import judge, look, next_look

HEADS, BUDGETS = 16, 9
EVEN = np.full(HEADS, 4)


def best_gains(curves):
    """Budgets of the same total as EVEN: frames where the next one helps most (convex curves)."""
    gains = -np.diff(curves.mean(0), axis=1)
    first = np.argsort(-gains, axis=None, kind="stable")[: EVEN.sum()] // (BUDGETS - 1)
    return np.bincount(first, minlength=HEADS)


def world(rng, spread):
    """True curves of heads whose importance spreads so much (in logs)."""
    size, decay = np.exp(rng.normal(0, spread, HEADS)), np.exp(rng.normal(-1, spread / 3, HEADS))
    frames = np.arange(BUDGETS)
    fall = np.exp(-decay[:, None] * frames)
    return size[:, None] * (fall - fall[:, -1:])


def measured(rng, truth, prompts, noise=0.5):
    heads = np.exp(rng.normal(0, noise, (prompts, HEADS, 1)) - noise**2 / 2)
    return truth * heads * np.exp(rng.normal(0, 0.3, (prompts, 1, 1)))


def total(curves, index):
    return sum(float(curves[head, place]) for head, place in enumerate(index))


def test_the_figures_are_those_of_loops_by_hand():
    rng = np.random.default_rng(0)
    curves = measured(rng, world(rng, 0.7), 6)
    found = look(curves, best_gains, EVEN, resamples=30, seed=2)
    mean, best = curves.mean(0), best_gains(curves)
    regrets, changes, by_prompt = [], [], [[] for _ in range(6)]
    for counts in resample_counts(6, 30, 2):
        drawn = [curves[p] for p in range(6) for _ in range(int(counts[p]))]
        index = best_gains(np.array(drawn))
        room = total(mean, EVEN) - total(mean, best)
        regrets.append((total(mean, index) - total(mean, best)) / room)
        unseen = [p for p in range(6) if counts[p] == 0]
        if unseen:
            rest = np.mean([curves[p] for p in unseen], axis=0)
            changes.append(np.log(total(rest, index) / total(rest, EVEN)))
        for p in unseen:
            by_prompt[p].append(np.log(total(curves[p], index) / total(curves[p], EVEN)))
    assert found.unseen == len(changes)
    assert found.regret == pytest.approx(np.percentile(regrets, 90), rel=1e-9)
    assert found.change == pytest.approx(np.percentile(changes, [5, 50, 95]), rel=1e-9)
    means = [np.mean(values) for values in by_prompt]
    assert found.gain == pytest.approx(1 - np.exp(np.mean(means)), rel=1e-9)
    ends = bca_interval(means)
    assert (found.gain_high, found.gain_low) == pytest.approx(tuple(1 - np.exp(ends)))
    there = [curves[:, head, 4] for head in range(HEADS)]
    errors = [x.std(ddof=1) / 6**0.5 / x.mean() for x in there]
    assert found.error == pytest.approx(np.median(errors), rel=1e-9)
    assert found.in_sample == pytest.approx(1 - total(mean, best) / total(mean, EVEN))


def test_nothing_is_chosen_on_the_prompts_left_out():
    rng, seen = np.random.default_rng(1), []
    curves = measured(rng, world(rng, 0.7), 8)

    def spy(some):
        seen.append({float(prompt[0, 0]) for prompt in some})
        return best_gains(some)

    look(curves, spy, EVEN, resamples=20)
    counts = resample_counts(8, 20, 0)
    expected = [{float(curves[p, 0, 0]) for p in np.flatnonzero(row)} for row in counts]
    assert seen == [{*curves[:, 0, 0].tolist()}, *expected]


def test_prompts_that_agree_settle_it_at_the_first_look():
    truth = world(np.random.default_rng(2), 1.0)
    found = look(np.repeat(truth[None], 8, 0), best_gains, EVEN)
    assert (found.verdict, found.stop, found.uniform) == ("table", True, False)
    assert (found.regret, found.error) == (0.0, 0.0)
    gain = 1 - total(truth, best_gains(truth[None])) / total(truth, EVEN)
    values = (found.gain, found.gain_low, found.gain_high, found.in_sample)
    assert values == pytest.approx((gain,) * 4)
    assert "against it" not in found.words and f"-{100 * gain:.1f} %" in found.words
    assert json.loads(json.dumps(asdict(found)))["verdict"] == "table"


def test_heads_without_structure_get_uniform_at_the_end_and_more_prompts_before():
    rng = np.random.default_rng(3)
    truth = world(rng, 0.0)
    for prompts in (8, 16, 32):
        found = look(measured(rng, truth, prompts), best_gains, EVEN, resamples=60)
        assert (found.verdict, found.stop) == ("more prompts", False)
    found = look(measured(rng, truth, 64), best_gains, EVEN, resamples=60)
    assert (found.stop, found.uniform) == (True, True)
    assert found.words.startswith("No head structure worth a table at this budget (64 prompts)")
    assert found.in_sample > found.gain  # the winner's curse
    early = look(measured(rng, truth, 16), best_gains, EVEN, last=True, resamples=60)
    assert early.uniform and early.words.endswith("64 prompts could show a gain that these do not.")
    assert "could show" not in found.words


def test_budgets_that_do_harm_are_said_to():
    rng = np.random.default_rng(9)
    all_or_nothing = np.array([8, 0] * (HEADS // 2))
    found = look(measured(rng, world(rng, 0.0), 64), lambda _: all_or_nothing, EVEN, resamples=60)
    assert found.uniform and found.change[0] > 0 and found.gain_high < 0
    assert "on unseen prompts they are worse than uniform ones" in found.words
    assert "change the loss of uniform ones by +" in found.words


def test_planted_structure_gets_its_table():
    rng, verdicts = np.random.default_rng(4), []
    for _ in range(10):
        found = look(measured(rng, world(rng, 1.0), 32), best_gains, EVEN, resamples=60)
        verdicts.append(found.verdict)
    assert verdicts.count("table") >= 9


def test_at_the_last_look_reality_alone_decides_and_doubts_are_said():
    rng = np.random.default_rng(5)
    curves = measured(rng, world(rng, 1.0), 8, noise=1.2)
    more, end = (look(curves, best_gains, EVEN, last=last, resamples=60) for last in (None, True))
    assert (more.verdict, end.verdict) == ("more prompts", "table")
    assert more.error > 0.15
    assert f"standard error of a head's loss is {100 * more.error:.1f} %" in more.words


def test_a_rule_that_says_uniform_gains_nothing():
    rng = np.random.default_rng(6)
    found = look(measured(rng, world(rng, 1.0), 64), lambda _: EVEN, EVEN, resamples=20)
    assert found.verdict == "uniform" and found.regret is None
    assert found.change == (0.0, 0.0, 0.0) and found.gain == found.in_sample == 0.0
    assert "they gain nothing" in found.words


def test_a_tie_that_rounds_apart_is_no_gain():
    """Straight lines of the same slope: every way to spend a total loses the same."""
    line = np.repeat(0.1 * np.arange(BUDGETS)[::-1][None], HEADS, 0)
    scale = np.exp(np.random.default_rng(8).normal(size=(64, 1, 1)))
    found = look(scale * line, lambda _: np.array([8, 0] * (HEADS // 2)), EVEN)
    assert found.verdict == "uniform" and found.change == (0.0, 0.0, 0.0)


def test_without_any_loss_nothing_can_be_told():
    found = look(np.zeros((64, HEADS, BUDGETS)), lambda _: EVEN, EVEN, resamples=20)
    assert found.uniform
    figures = (found.regret, found.change, found.error, found.gain, found.in_sample)
    assert figures == (None,) * 5 and found.unseen == 0


@pytest.mark.parametrize(
    ("most", "regret", "error", "early", "late"),
    [
        (-0.01, 0.15, 0.15, "table", "table"),
        (0.0, 0.0, 0.0, "more prompts", "uniform"),  # the 95th percentile, not the middle
        (-0.01, 0.16, 0.1, "more prompts", "table"),
        (-0.01, 0.1, 0.16, "more prompts", "table"),
        (-0.01, None, 0.1, "more prompts", "table"),
    ],
)
def test_a_table_is_better_settled_and_exact(most, regret, error, early, late):
    change = (-0.3, -0.2, most)
    assert judge(regret, change, error, False) == early
    assert judge(regret, change, error, True) == late


def test_looks_are_fixed():
    assert [next_look(n) for n in (0, 7, 8, 20, 63, 64, 90)] == [8, 8, 16, 32, 64, None, None]


@pytest.mark.parametrize(
    ("curves", "solve", "said"),
    [
        (np.ones((1, HEADS, BUDGETS)), best_gains, "the first look is at 8"),
        (np.ones((4, HEADS)), best_gains, "two prompts or more"),
        (-np.ones((4, HEADS, BUDGETS)), best_gains, "cannot be negative"),
        (np.full((4, HEADS, BUDGETS), np.nan), best_gains, "finite"),
        (np.ones((4, HEADS, BUDGETS)), lambda _: EVEN[:3], "The rule's answer should be a place"),
        (np.ones((4, HEADS, BUDGETS)), lambda _: EVEN + 0.5, "type float64"),
        (np.ones((4, HEADS, BUDGETS)), lambda _: EVEN + 5, "whole numbers from 0 to 8"),
    ],
)
def test_bad_input_is_refused(curves, solve, said):
    with pytest.raises(ValueError, match=said):
        look(curves, solve, EVEN)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [8, 16, 32])
@pytest.mark.parametrize(("spread", "noise"), [(0.5, 0.5), (1.0, 0.5), (1.0, 1.0)])
def test_the_predicted_gain_is_a_careful_one(prompts, spread, noise):
    rng, above, below, gaps = np.random.default_rng(prompts), [], [], []
    for _ in range(100):
        truth = world(rng, spread)
        curves = measured(rng, truth, prompts, noise)
        found = look(curves, best_gains, EVEN, resamples=100)
        # What a test on new prompts would find: the mean of their log-ratios.
        new, index = measured(rng, truth, 200, noise), best_gains(curves)
        ratios = [np.log(total(p, index) / total(p, EVEN)) for p in new]
        gain = 1 - np.exp(np.mean(ratios))
        above.append(found.gain_low <= gain)
        below.append(gain <= found.gain_high)
        gaps.append(found.gain - gain)
    assert np.mean(above) >= 0.95 and np.mean(below) >= 0.8
    assert -0.08 < np.mean(gaps) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_without_structure_no_look_says_table(noise):
    rng, tables = np.random.default_rng(7), 0
    for _ in range(60):
        truth = world(rng, 0.0)
        curves = measured(rng, truth, 64, noise)
        verdicts = [look(curves[:n], best_gains, EVEN, resamples=60).verdict for n in (8, 16, 64)]
        tables += "table" in verdicts
    assert tables <= 1
