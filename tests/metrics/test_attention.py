"""Attention fidelity against closed forms, whole attention matrices and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.metrics.attention import (
    AttentionFidelity,
    output_error,
    retained_mass,
    topk_recall,
)


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


def test_topk_recall_is_that_of_plain_sets():
    rng = torch.Generator().manual_seed(3)
    weights = torch.rand(4, 5, 12, generator=rng)
    kept = torch.rand(4, 1, 12, generator=rng) < 0.4
    for k in (1, 3, 12):
        found = topk_recall(weights, kept, k)
        for head, query in np.ndindex(4, 5):
            order = sorted(range(12), key=lambda n: -weights[head, query, n].item())
            there = {n for n in range(12) if kept[head, 0, n]}
            assert found[head, query].item() == len(there & set(order[:k])) / k


CELLS = {"layers": 2, "heads": 3, "steps": 2, "chunks": 4}


def made_up(count=30, seed=0):
    """Updates in random cells, each with its own number of queries."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        queries = int(rng.integers(1, 9))
        full = torch.tensor(rng.normal(size=(3, queries)))
        mass = torch.tensor(rng.beta(5, 1, size=(3, queries)))
        out, error = torch.tensor(rng.normal(size=(2, 3, queries, 4)))
        where = {name: int(rng.integers(n)) for name, n in (("layer", 2), ("step", 2))}
        yield (
            (full + mass.log(), full, out + 0.1 * error, out),
            where | {"chunk": int(rng.integers(3))},
        )


def test_means_and_quantiles_are_those_of_plain_lists():
    metric, cells = AttentionFidelity(**CELLS), {}
    for (kept, full, out, ref), where in made_up():
        metric.update(kept, full, out, ref, **where)
        for head, query in np.ndindex(*kept.shape):
            own = cells.setdefault((where["layer"], head, where["step"], where["chunk"]), [])
            mass = math.exp(kept[head, query] - full[head, query])
            error = math.dist(out[head, query], ref[head, query]) / math.hypot(*ref[head, query])
            own.append((mass, error))
    found = metric.compute()
    for i, name in enumerate(("retained_mass", "attention_error")):
        assert found[name].shape == (2, 3, 2, 4)
        for cell in np.ndindex(2, 3, 2, 4):
            own = [pair[i] for pair in cells.get(cell, [])]
            expected = sum(own) / len(own) if own else math.nan
            assert found[name][cell].item() == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert found[name][..., 3].isnan().all()
    every = np.array([pair for own in cells.values() for pair in own])
    for name, column, q in (("retained_mass_p05", 0, 0.05), ("attention_error_p95", 1, 0.95)):
        low, high = (np.quantile(every[:, column], q, method=m) for m in ("lower", "higher"))
        assert low - 0.001 <= found[name].item() <= high + 0.001


def test_shards_merge_by_addition():
    whole, parts = AttentionFidelity(**CELLS), [AttentionFidelity(**CELLS) for _ in range(3)]
    for i, (tensors, where) in enumerate(made_up()):
        for metric in (whole, parts[i % 2]):  # the third has seen nothing
            metric.update(*tensors, **where)
    for part in parts[1:]:
        parts[0].merge_state(part)
    for name, expected in whole.compute().items():
        merged = parts[0].compute()[name]
        torch.testing.assert_close(merged, expected, equal_nan=True, rtol=1e-14, atol=0)
    parts[2].load_state_dict(whole.state_dict())
    for name, expected in whole.compute().items():
        torch.testing.assert_close(parts[2].compute()[name], expected, equal_nan=True)


def test_quantiles_beyond_the_edges_and_of_nothing():
    metric = AttentionFidelity(1, 1, 1, 1)
    assert all(value.isnan().all() for value in metric.compute().values())
    ones = torch.ones(1, 10, 2)
    scale = torch.tensor([1.5] * 9 + [1e30]).view(1, 10, 1)
    metric.update(torch.zeros(1, 10), torch.zeros(1, 10), scale * ones, ones, 0, 0, 0)
    found = metric.compute()
    assert found["attention_error_p95"].item() == math.inf
    assert found["retained_mass_p05"].item() == pytest.approx(1, abs=1e-3)
    metric.reset()
    metric.update(torch.zeros(1, 9), torch.zeros(1, 9), 1.5 * ones[:, :9], ones[:, :9], 0, 0, 0)
    assert metric.compute()["attention_error_p95"].item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "given"),
    [
        (lambda: retained_mass(torch.zeros(2), torch.zeros(3)), r"\(2,\) and \(3,\)"),
        (lambda: output_error(torch.zeros(1, 2), torch.zeros(2)), r"\(1, 2\) and \(2,\)"),
        (lambda: topk_recall(torch.zeros(4), torch.ones(4).bool(), 5), "The 5 largest of 4"),
        (lambda: topk_recall(torch.zeros(4), torch.ones(4).bool(), 0), "from 1 to 4"),
        (lambda: fed(torch.zeros(2, 5), torch.ones(2, 5, 4)), "a metric of 3 heads"),
        (lambda: fed(torch.zeros(3, 5), torch.ones(3, 4, 4)), r"\(3, 5\) and .* \(3, 4, 4\)"),
        (lambda: fed(torch.zeros(3, 5), torch.zeros(3, 5, 4)), "chunk 1 has 15 .* not finite"),
        (lambda: fed(torch.full((3, 5), torch.nan), torch.ones(3, 5, 4)), "15 .* not finite"),
    ],
)
def test_what_does_not_fit_is_refused(call, given):
    with pytest.raises(ValueError, match=given):
        call()


def fed(lse, out):
    AttentionFidelity(**CELLS).update(lse, lse, out, out, layer=0, step=0, chunk=1)
