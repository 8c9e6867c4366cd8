"""What memories hold at each budget: closed forms, and a rollout of the policy itself."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_network import TINY, encoder

from lightning_kv.calibration.clips import ClipMeter
from lightning_kv.calibration.memory import Memory, frames_held
from lightning_kv.calibration.scorers import canonical, scorer_names, scorer_of
from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.part import PARTS
from lightning_kv.policies.registry import load_policy, policy_from_dict, preset
from lightning_kv.rollout import rollout


@cache
def model():
    torch.manual_seed(0)
    return VideoModel(CausalWan(TINY).double().eval(), None, encoder)


def clip(frames=18):
    return torch.randn(frames, 1, 2, 6, generator=torch.Generator().manual_seed(4)).double()


def ids(held):
    """Frames of each head, of bool [H, S]."""
    return [own.nonzero().flatten().tolist() for own in held]


def test_a_window_holds_the_newest_and_a_sink_the_first():
    budgets, told = range(10), []
    for name, sink in (("window", 0), ("sink-window", 3)):
        policy = load_policy(name)
        memory = Memory(policy, (*budgets,), 3, 1)
        found = memory.held(model(), (3, 4), "a", "x", clip(), lambda: told.append(1))
        assert sorted(found) == [3, 4]
        for chunk, layers in found.items():
            before = 3 * chunk
            assert len(layers) == 3
            assert all(own.shape == (10, 2, before) and own.dtype == torch.bool for own in layers)
            for budget in budgets:
                first = sink if budget >= policy.retain.smallest(3) else 0
                expected = [*range(first), *range(before - budget + first, before)]
                assert all(ids(own[budget]) == [expected] * 2 for own in layers)
    assert len(told) == 9 + 7  # what is looked up: 1 to 9, and 3 to 9 behind a sink


@pytest.mark.parametrize("name", ["snap-kv", "heavy-hitters", "random-memory"])
def test_it_is_what_a_rollout_of_the_policy_held(name):
    policy, seen = load_policy(name).budgeted("6f"), {}

    def note(view):
        if view.step.step == 0 and view.step.phase == "denoise":
            seen.setdefault(view.step.chunk, []).append(frames_held(view))

    made = rollout(model(), policy, "x", 18, keys=["a"], watch=note, decode=False)
    memory = Memory(load_policy(name), (6,), 3, 3)
    found = memory.held(model(), (3, 4, 5), "a", "x", made.latents[0])
    if name != "random-memory":
        assert any(not torch.equal(own[0], own[1]) for own in seen[5])  # heads differ
    for chunk, layers in found.items():
        assert all(len(each) == 6 for own in layers for each in ids(own[0]))
        for own, other in zip(layers, seen[chunk], strict=True):
            assert torch.equal(own[0], other)


@pytest.mark.parametrize("name", ["window", "sink-window", "snap-kv"])
def test_between_two_that_are_looked_up_the_newest_of_the_larger_ones_are_added(name):
    budgets, policy = range(1, 12), load_policy(name)
    every, some = (
        Memory(policy, (*budgets,), 3, step).held(model(), (4,), "a", "x", clip())[4]
        for step in (1, 3)
    )
    least = policy.retain.smallest(3)
    looked = Memory(policy, (*budgets,), 3, 3).looked_up
    assert looked == (*range(least, 11, 3), 11)
    for full, few in zip(every, some, strict=True):
        for place, budget in enumerate(budgets):
            if name != "snap-kv" or budget in looked or budget < least:
                assert torch.equal(full[place], few[place])
                continue
            low = max(own for own in looked if own < budget) - 1  # places in the grid
            high = min(own for own in looked if own > budget) - 1
            for head in range(2):
                old, new = ({*ids(few[n])[head]} for n in (low, high))
                more = sorted(new - old)[-(budget - 1 - low) :]
                assert {*ids(few[place])[head]} == old | {*more}


def test_curves_of_a_memory_are_losses_of_what_it_holds():
    settings = SiteSettings(
        reach=6, scorers=("mass", "snap-kv", "window"), chunks=2, probes=2, exact=(3, 6), batch=4
    )
    meter = ClipMeter(model(), preset("full"), settings, 18)
    told = []
    found = meter.of_prompt("a", "a", "x", validates=True, progress=told.append)
    assert sum(told) == pytest.approx(1)
    assert max(chunk for chunk, _ in found.sites) > 2  # else nothing is ever dropped
    for (chunk, _), record in found.sites.items():
        for metric in ("mass", "output", "gn"):
            best, snap, window = (record[f"{metric}/{name}"] for name in settings.scorers)
            torch.testing.assert_close(snap[..., :4], window[..., :4])  # the newest chunk at most
            assert torch.equal(snap[..., 6], window[..., 6]) == (chunk == 2)
            if metric == "mass":  # nothing holds more of it than those frames that have most
                assert bool((best <= snap + 1e-12).all())
        torch.testing.assert_close(record["exact/snap-kv"][..., 0], record["exact/window"][..., 0])
    plain = ClipMeter(model(), preset("full"), replace(settings, scorers=("mass",)), 18)
    alone = plain.of_prompt("a", "a", "x", validates=True)
    for place, record in alone.sites.items():  # memories change nothing of the others
        for name in ("mass/mass", "gn/mass", "exact/mass", "zero"):
            assert torch.equal(record[name], found.sites[place][name])


def test_a_reference_that_has_dropped_what_a_memory_holds_is_refused():
    settings = SiteSettings(reach=6, scorers=("random-memory",), chunks=2, probes=0)
    meter = ClipMeter(model(), preset("sliding-window@6f"), settings, 18)
    with pytest.raises(ValueError, match="Give a reference that drops none, such as full"):
        meter.of_prompt("a", "a", "x")


def test_parts_of_frames_are_refused():
    rows = {
        "name": "r",
        "retain": {"part": "heavy-hitters", "granularity": "token", "budget": "9f"},
    }
    with pytest.raises(ValueError, match="does not hold whole frames as they were made"):
        Memory(policy_from_dict(rows), (6,), 3, 3).held(model(), (4,), "a", "x", clip())


def test_names_of_scorers():
    names = scorer_names()
    assert {"mass", "recency", "focused", "snap-kv", "heavy-hitters", "window"} <= {*names}
    for name in names:
        found, memory = scorer_of(name), name in PARTS["retain"]
        assert isinstance(found, CachePolicy) == memory and callable(found) != memory
    for name, why in (
        ("full", "its memory has no budget"),
        ("oracle", "it needs outputs"),
        ("forcing-kv", "it keeps single rows"),
        ("infinity-rope", "it does more than keep frames"),
        ("snap-vk", "snap-kv"),
    ):
        with pytest.raises(ValueError, match=why):
            scorer_of(name)


def test_a_preset_goes_by_the_name_of_its_part_unless_it_sets_more():
    assert [canonical(name) for name in ("h2o", "snap-kv", "mass", "focused")] == [
        "heavy-hitters",
        "snap-kv",
        "mass",
        "focused",
    ]
    assert canonical("sink-window") == "sink-window" and canonical("sliding-window") == "window"


def test_what_a_memory_keeps_is_its_own_affair():
    with pytest.raises(ValueError, match="what snap-kv keeps is its own affair"):
        SiteSettings(reach=6, sink=3, scorers=("mass", "snap-kv"))
    with pytest.raises(ValueError, match="every=0"):
        SiteSettings(every=0)
