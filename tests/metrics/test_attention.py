"""Retained mass and output error against closed forms, whole attention matrices and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.metrics.functional import output_error, retained_mass


def evicted(query, keys, values, kept):
    """Log-sum-exps, and outputs of full attention, of the kept and of the evicted rows alone."""
    logits = keys @ query / math.sqrt(len(query))
    lse = [logits[chosen].logsumexp(0) for chosen in (kept, torch.ones_like(kept))]
    parts = (torch.ones_like(kept), kept, ~kept)
    return *lse, *(logits[chosen].softmax(0) @ values[chosen] for chosen in parts)


def test_the_worked_example():
    """Three rows of which the third is evicted; digits from a calculation by hand."""
    query = torch.tensor([1.0, 0.0]).double()
    keys = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    kept = torch.tensor([True, True, False])
    lse_kept, lse_all, full, own, gone = evicted(query, keys, values, kept)
    mass = retained_mass(lse_kept, lse_all)
    assert mass.item() == pytest.approx(0.859970754956622, abs=1e-15)
    assert (full - own).tolist() == pytest.approx([0.04624304, 0.0937862], abs=5e-9)
    assert ((1 - mass) * (gone - own)).tolist() == pytest.approx((full - own).tolist(), abs=1e-15)
    expected = math.hypot(0.04624304, 0.0937862) / math.hypot(*full.tolist())
    assert output_error(own, full).item() == pytest.approx(expected, rel=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.floats(0.1, 20))
def test_mass_and_evicted_values_say_the_whole_error(seed, rows, sharpness):
    """o - o_kept = (1 - r)(o_evicted - o_kept), and the distances of the two softmaxes."""
    rng = torch.Generator().manual_seed(seed)
    query, *rest = torch.randn(1 + 2 * rows, 6, generator=rng).double()
    keys, values = torch.stack(rest[:rows]), torch.stack(rest[rows:])
    kept = torch.rand(rows, generator=rng) < 0.5
    kept[0], kept[-1] = True, False
    lse_kept, lse_all, full, own, gone = evicted(sharpness * query, keys, values, kept)
    mass = retained_mass(lse_kept, lse_all)
    torch.testing.assert_close(full - own, (1 - mass) * (gone - own), atol=1e-12, rtol=0)
    p = (sharpness * keys @ query / math.sqrt(6)).softmax(0)
    renormalised = torch.where(kept, p, 0) / p[kept].sum()
    total_variation = (p - renormalised).abs().sum() / 2
    divergence = (renormalised[kept] * (renormalised[kept] / p[kept]).log()).sum()
    assert (1 - mass).item() == pytest.approx(total_variation.item(), abs=1e-12)
    assert -mass.log().item() == pytest.approx(divergence.item(), abs=1e-10)


def test_mass_is_neither_clamped_nor_lost_in_half_precision():
    one = torch.tensor([2.0, -90.0], dtype=torch.bfloat16)
    other = torch.tensor([1.0, 10.0], dtype=torch.bfloat16)
    found = retained_mass(one, other)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([math.e, math.exp(-100)], rel=1e-12)


def test_errors_of_outputs_that_are_zero():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert output_error(zero, one).tolist() == pytest.approx([1.0, 1.0], rel=1e-15)
    assert output_error(one, zero).isinf().all()
    assert output_error(zero, zero).isnan().all()


@pytest.mark.parametrize(
    ("call", "given"),
    [
        (lambda: retained_mass(torch.zeros(2), torch.zeros(3)), r"\(2,\) and \(3,\)"),
        (lambda: output_error(torch.zeros(1, 2), torch.zeros(2)), r"\(1, 2\) and \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, given):
    with pytest.raises(ValueError, match=given):
        call()
