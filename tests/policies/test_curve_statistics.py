"""Shrinkage, spread and gain out of bag, against closed forms and simulations."""

import math

import pytest
import torch

from lightning_kv.policies.allocation import uniform
from lightning_kv.policies.curve_statistics import (
    am_gm,
    each_frame,
    gini,
    loss_of,
    resampled,
    shrunken,
    summed_up,
    undecided,
)
from lightning_kv.policies.knapsack import optimal
from lightning_kv.policies.tables import shipped


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("tau", "noise"), [(1.0, 0.5), (0.3, 0.6), (0.5, 0.1)])
def test_shrinkage_leaves_the_error_of_the_best_linear_guess(tau, noise):
    """tau^2 s^2 / (tau^2 + s^2), in logs: the error of the posterior mean."""
    layers, heads = 40, 100
    truth = 3 * normal(layers, 1, 2) + tau * normal(layers, heads, 2, seed=1)
    seen = truth + noise * normal(layers, heads, 2, seed=2)
    found = shrunken(seen.exp(), noise * seen.exp()).log()
    best = tau**2 * noise**2 / (tau**2 + noise**2)
    assert float(((found - truth) ** 2).mean()) == pytest.approx(best, rel=0.06)
    assert float(((seen - truth) ** 2).mean()) == pytest.approx(noise**2, rel=0.06)


def test_two_heads_by_hand():
    """Logs 0 and 2, standard errors 0.5 and 0.1: tau^2 is 2 - 0.13, two weights."""
    mean = torch.tensor([0.0, 2.0], dtype=torch.float64).exp().view(1, 2, 1)
    error = mean * torch.tensor([0.5, 0.1]).view(1, 2, 1)
    spread = 2 - (0.25 + 0.01) / 2
    expected = [1 - spread / (spread + 0.25), 1 + spread / (spread + 0.01)]
    assert shrunken(mean, error).log().flatten().tolist() == pytest.approx(expected)


def test_shrunk_curves_keep_more_of_the_gain():
    """Twelve draws of heads that differ little, seen with an error of 40 %."""
    kept = {"plain": 0.0, "shrunk": 0.0}
    for seed in range(12):
        truth = planted(1, 0.5, noise=0.0, heads=(30, 12), seed=3 * seed)[0]
        mean, error = summed_up(planted(16, 0.5, 1.1, (30, 12), 3 * seed))
        even, best = (
            loss_of(truth, own, 2) for own in (uniform(30, 12, 1440), optimal(truth, 1440, 2))
        )
        for name, curves in (("plain", mean), ("shrunk", shrunken(mean, error))):
            own = loss_of(truth, optimal(curves, 1440, 2), 2)
            kept[name] += (even - own) / (even - best) / 12
    assert kept["shrunk"] > kept["plain"] + 0.02 > 0.4


def test_noise_alone_is_shrunk_to_the_layer():
    mean = (0.01 * normal(3, 8, 1)).exp()
    found = shrunken(mean, torch.full_like(mean, 0.5)).log()
    centre = mean.log().mean(1, keepdim=True).expand_as(found)
    torch.testing.assert_close(found, centre)


def test_points_without_loss_and_heads_alone_stay():
    mean = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    found = shrunken(mean, 0.01 * mean)
    assert (found[mean == 0] == 0).all() and (found[mean > 0] > 0).all()
    alone = mean[:, :1]
    assert torch.equal(shrunken(alone, 0.3 * alone), alone)
    with pytest.raises(ValueError, match=r"one prompt tells nothing .* Give two prompts or more"):
        shrunken(mean, None)


def test_one_curve_from_those_of_prompts():
    curves = normal(9, 2, 3, 4).exp()
    mean, error = summed_up(curves)
    torch.testing.assert_close(mean, curves.mean(0))
    torch.testing.assert_close(error, curves.std(0) / 3)
    worst, error = summed_up(curves, "cvar")  # 3 of 9, each head's and budget's own
    torch.testing.assert_close(worst, curves.topk(3, dim=0).values.mean(0))
    for count in (2, 4, 5, 9):  # the jackknife, one prompt left out after the other
        some = curves[:count]
        left = torch.stack(
            [summed_up(torch.cat([some[:out], some[out + 1 :]]), "cvar")[0] for out in range(count)]
        )
        expected = ((count - 1) / count * (left - left.mean(0)).square().sum(0)).sqrt()
        torch.testing.assert_close(summed_up(some, "cvar")[1], expected)
    assert summed_up(curves[:1])[1] is None and summed_up(curves[:1], "cvar")[1] is None
    with pytest.raises(ValueError, match=r"No objective 'median'. Use one of: mean, cvar"):
        summed_up(curves, "median")


def test_between_measured_budgets_lie_straight_lines():
    curves = torch.tensor([[8.0, 4.0, 0.0]], dtype=torch.float64)
    assert each_frame((2, 4, 8), curves, 2, 8).tolist() == [[8, 6, 4, 3, 2, 1, 0]]
    assert each_frame((2, 4, 8), curves, 3, 5).tolist() == [[6, 4, 3]]
    assert each_frame((2,), curves[:, :1], 2, 2).tolist() == [[8]]


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_am_over_gm_of_log_normal_importance(sigma):
    found = am_gm((sigma * normal(200, 1000)).exp())
    assert found == pytest.approx(math.exp(sigma**2 / 2), rel=0.01)
    assert am_gm(torch.tensor([1.0, 0.0])) is None


def test_of_the_published_table_nothing_can_be_gained():
    """1.0004 without its three outliers: nothing was subtracted from it."""
    rows = shipped()["focused-forcing-wan-1.3b"].rows
    typical = torch.tensor(rows, dtype=torch.float64).flatten().sort().values[2:-1]
    assert round(am_gm(typical), 4) == 1.0004


def test_gini():
    assert gini(torch.full((3, 4), 5)) == pytest.approx(0)
    assert gini(torch.tensor([[0, 0], [0, 8]])) == pytest.approx(0.75)  # (n - 1) / n
    value = torch.tensor([[1, 2, 3], [4, 9, 17]])
    pairs = (value.flatten()[:, None] - value.flatten()[None]).abs().double().sum()
    assert gini(value) == pytest.approx(float(pairs) / (2 * 36 * 6))


def planted(prompts, sigma, noise=0.3, heads=(3, 4), seed=0):
    """Curves of heads that differ, seen with noise."""
    step = torch.arange(8, dtype=torch.float64)
    size = (sigma * normal(*heads, seed=seed)).exp().unsqueeze(-1)
    return size * (-0.5 * step).exp() * (noise * normal(prompts, *heads, 1, seed=seed + 1)).exp()


def solver(prompts, total=12 * 4, low=2):
    return optimal(shrunken(*summed_up(prompts)), total, low)


def test_out_of_bag_a_planted_gain_is_found():
    prompts = planted(16, 1.0)
    found = resampled(range(2, 10), prompts, solver, uniform(3, 4, 48), draws=60)
    assert found.sure and found.quantile(0.5) < -0.15
    assert found.gain < 0 and max(found.regrets) < 0.5 and min(found.regrets) > -1e-9
    again = resampled(range(2, 10), prompts, solver, uniform(3, 4, 48), draws=60)
    assert again == found


def test_out_of_bag_nothing_is_found_where_nothing_is():
    """In sample it looks like a gain all the same."""
    prompts = planted(6, 0.0, noise=1.0)
    found = resampled(
        range(2, 10),
        prompts,
        lambda own: optimal(own.mean(0), 48, 2),
        uniform(3, 4, 48),
        draws=60,
    )
    assert not found.sure and found.gain < -0.02 < found.quantile(0.95)


def test_too_few_prompts_are_not_judged():
    with pytest.raises(ValueError, match=r"2 prompts, .* Give three prompts or more"):
        resampled(range(2, 10), planted(2, 1.0), solver, uniform(3, 4, 48))


def test_heads_that_may_as_well_get_one_more():
    """Two heads alike but for noise, one far away, and one that is sure."""
    gains = torch.tensor([[[4.0, 2.0, 1.0], [3.9, 2.1, 0.9], [9.0, 8.0, 7.0]]])
    curve = torch.cat([gains.flip(-1).cumsum(-1).flip(-1), gains[..., :1] * 0], -1).double()
    noise = torch.tensor([0.2, 0.2, 0.2]).view(1, 1, 3, 1) * normal(8, 1, 3, 4)
    noise = noise - noise.mean(0)
    budgets = optimal(curve, 3 * 2 + 5, 2)
    assert budgets.tolist() == [[3, 3, 5]]
    last, near = undecided(curve + noise, curve, budgets, 2)
    assert last == pytest.approx(3.9)
    assert near.tolist() == [[True, True, False]]
    assert loss_of(curve, budgets, 2) == pytest.approx(3 + 3 + 0)


@pytest.mark.parametrize(("off", "near"), [(1.9, True), (2.1, False)])
def test_near_is_within_two_standard_errors(off, near):
    """One frame for two heads: what the other would have gained is so many errors less."""
    wave = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    error = 0.1 * float(wave.std()) / 2
    gains = torch.tensor([5.0, 5.0 - off * error], dtype=torch.float64)
    curve = torch.stack([gains, torch.zeros(2)], -1).unsqueeze(0)
    prompts = curve.repeat(4, 1, 1, 1)
    prompts[:, 0, :, 0] += 0.1 * wave.unsqueeze(1)
    _, found = undecided(prompts, curve, torch.tensor([[3, 2]]), 2)
    assert found.tolist() == [[True, near]]
