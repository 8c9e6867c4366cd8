"""What a policy costs against plain arithmetic, however the clips are spread over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kv.metrics.cost import CacheCost

CLIPS = [
    (1200, [600, 1200, 1000], 50, 0, [0.5, 1.0]),
    (900, [900], 70, 8, []),
    (2**53 - 1, [0, 2**52], 2**40, 3, [0.25, 4.0, 0.5]),
    (10, [10, 0], 0, 0, [2.0]),
]


def expected(clips):
    seconds = [second for clip in clips for second in clip[4]]
    count = len(clips)
    return {
        "kv_bytes_peak": max(clip[0] for clip in clips),
        "kv_bytes_mean": sum(sum(clip[1]) / len(clip[1]) for clip in clips) / count,
        "kv_rows_read": sum(clip[2] for clip in clips) / count,
        "kv_rows_scored": sum(clip[3] for clip in clips) / count,
        "seconds_per_chunk": sum(seconds) / len(seconds),
        "seconds_per_chunk_max": max(seconds),
    }


@settings(max_examples=20, deadline=None)
@given(ranks=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_costs_are_plain_arithmetic_on_any_number_of_ranks(ranks):
    shards = [CacheCost() for _ in range(3)]
    for rank, clip in zip(ranks, CLIPS, strict=True):
        shards[rank].update(*clip)
    for shard in shards[1:]:
        shards[0].merge_state(shard)
    found = {name: value.item() for name, value in shards[0].compute().items()}
    assert found == pytest.approx(expected(CLIPS), rel=1e-12)


def test_what_was_not_seen_is_not_a_number_and_not_zero():
    cost = CacheCost()
    assert all(value.isnan() for value in cost.compute().values())
    cost.update(900, [900], 70, 8)
    found = cost.compute()
    assert found["kv_bytes_peak"] == 900
    assert found["seconds_per_chunk"].isnan()
    assert found["seconds_per_chunk_max"].isnan()
    cost.reset()
    assert cost.compute()["kv_bytes_peak"].isnan()


def test_states_are_sums_and_lists_in_float64():
    cost = CacheCost()
    cost.update(*CLIPS[0])
    states = [s[0] if isinstance(s, list) else s for s in cost.metric_state.values()]
    assert {state.dtype for state in states} == {torch.float64}
    reductions = {name: reduce.__name__ for name, reduce in cost._reductions.items()}
    assert {name for name, reduce in reductions.items() if "cat" in reduce} == {"peaks", "slowest"}
    assert {name for name, reduce in reductions.items() if "sum" in reduce} == {
        "sums",
        "clips",
        "seconds",
        "chunks",
    }


def test_costs_are_saved_and_loaded(recwarn):
    cost, loaded = CacheCost(), CacheCost()
    for clip in CLIPS[:2]:
        cost.update(*clip)
    loaded.load_state_dict(cost.state_dict())
    assert loaded.compute() == cost.compute()
    for metric in (cost, loaded):
        metric.update(*CLIPS[2])
    assert loaded.compute() == cost.compute()
    assert not [w for w in recwarn if "before the ``update``" in str(w.message)]


@pytest.mark.parametrize(
    ("clip", "given"),
    [
        ((10, [], 0, 0), r"\[\] bytes per chunk"),
        ((10, [-1], 0, 0), r"\[-1\] bytes"),
        ((10, [1], float("nan"), 0), "nan rows"),
        ((10, [1], 0, 0, [float("inf")]), r"\[inf\] seconds"),
        ((10, [11], 0, 0), "more than the peak of 10"),
    ],
)
def test_impossible_costs_are_refused(clip, given):
    cost = CacheCost()
    with pytest.raises(ValueError, match=given):
        cost.update(*clip)
    assert cost.clips == 0
