"""Statistics that are collected, against explicit weighted sums; and the look at the next chunk."""

import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
from slow import Ask, AskAtCommit, Scattered, play, policy, rolling, session, tape, twin, world
from twin import passes

from lightning_kv.cache.decisions import Event
from lightning_kv.cache.needs import cell_index
from lightning_kv.cache.passes import Pass
from lightning_kv.policies.base import RetainPart

LAYERS, HEADS, WIDTH = twin.GEOMETRY.layers, twin.GEOMETRY.heads, twin.GEOMETRY.head_dim


def collected(needs, recorded, name, event=None):
    """The statistic of every layer after every commit."""
    found = []

    def question(views):
        found.append([view.collected[name] for view in views])
        return [None] * len(views)

    made = policy(retain=AskAtCommit(question=question, wanted=needs))
    play(session(made), recorded, event=event)
    return found


def clean(recorded, head, layer=1):
    """Queries of one stream that become final in a clean pass: chunk by chunk (frame, place, q)."""
    tokens, chunks = twin.GEOMETRY.tokens, []
    for step, own, q, _, _ in recorded:
        if own == layer and step.final and step.phase != "denoise" and not step.rebuild:
            rows = q[0, :, head].double()
            chunks.append(
                [
                    (step.frames[i // tokens], i % tokens, x)
                    for i, x in enumerate(rows)
                    if step.frames[i // tokens] in step.final
                ]
            )
    return chunks


def switch_at(chunk):
    """Tells a session of another prompt when a chunk opens."""

    def event(on, step):
        if step.chunk == chunk:
            on.event(Event("prompt_switch", step.start, "other"), step)

    return event


# -- cells -----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(*[st.integers(1, 7)] * 4)
def test_cells_tile_the_frame(rows, columns, down, across):
    """Each is a rectangle; sizes differ by at most one row or column; never more than tokens."""
    index = cell_index((rows, columns), (down, across)).view(rows, columns)
    down, across = min(rows, down), min(columns, across)
    assert index.unique().tolist() == list(range(down * across))
    heights, widths = set(), set()
    for cell in range(down * across):
        there = (index == cell).nonzero()
        low, high = there.min(0).values, there.max(0).values
        height, width = (high - low + 1).tolist()
        assert height * width == len(there), "a cell is a rectangle"
        heights.add(height)
        widths.add(width)
    assert max(heights) - min(heights) <= 1 and max(widths) - min(widths) <= 1


# -- moments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("grid", "cells"), [((2, 2), (1, 1)), ((3, 2), (2, 2)), ((2, 5), (4, 3))])
def test_moments_are_those_of_weighted_queries(grid, cells, rate, monkeypatch):
    """Every query ever seen keeps a weight; a new pass takes max(1/n, rate) from the others."""
    world(monkeypatch, grid)
    recorded = tape(passes(4, noisy=1))
    needs = {"query_moments": {"cells": cells, "rate": rate}}
    after = collected(needs, recorded, "query_moments")
    where = cell_index(grid, cells).tolist()
    for head in range(HEADS):
        seen = []  # (weight, cell, query)
        for count, (chunk, found) in enumerate(zip(clean(recorded, head), after, strict=True), 1):
            weight = max(1 / count, rate)
            seen = [((1 - weight) * w, c, x) for w, c, x in seen]
            seen += [(weight / len(chunk), where[place], x) for _, place, x in chunk]
            mean = {
                c: sum(w * x for w, k, x in seen if k == c) / sum(w for w, k, _ in seen if k == c)
                for c in set(where)
            }
            spread = sum(w * (x - mean[c]).square() for w, c, x in seen)
            moments = found[1]
            assert moments.count == count and moments.cell.tolist() == where
            expected = torch.stack([mean[c] for c in sorted(mean)])
            torch.testing.assert_close(moments.mean[head].double(), expected, atol=1e-5, rtol=0)
            pairs = spread.view(-1, 2).sum(1)  # of a complex pair: both its parts
            torch.testing.assert_close(moments.variance[head].double(), pairs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("need", ["query_moments", "query_bank"])
def test_only_frames_that_become_final_count(need):
    """Not in denoising passes, not those that stay provisional or are encoded again."""

    def steps():
        for chunk in range(3):
            frames = (2 * chunk, 2 * chunk + 1, 2 * chunk + 2)
            final = frames[:2]
            yield Pass("denoise", frames, (500.0,) * 3, chunk, opens=True, next_chunk=2)
            yield Pass("commit", frames, (0.0,) * 3, chunk, next_chunk=2)
            yield Pass("commit", frames, (0.0,) * 3, chunk, final=final, next_chunk=2)
            yield Pass("prefill", (0,), (0.0,), chunk, final=(0,), rebuild=True)

    recorded = tape(steps())
    found = collected({need: {}}, recorded, need)[-1][1]
    rows = [x for chunk in clean(recorded, head=2) for _, _, x in chunk]
    assert len(rows) == 3 * 2 * 4
    if need == "query_moments":
        mean = sum(rows) / len(rows)
        torch.testing.assert_close(found.mean[2, 0].double(), mean, atol=1e-6, rtol=0)
    else:
        ours = {tuple(x) for x in found.query[2].tolist()}
        assert ours == {tuple(x.float().tolist()) for x in rows}


@pytest.mark.parametrize("need", ["query_moments", "query_bank"])
def test_denoising_passes_tell_nothing(need):
    """Also where they make frames final."""
    for found in collected({need: {}}, tape(rolling(3, 2, apart=False)), need):
        assert found == [None] * LAYERS


# -- bank ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "chunk", "frames", "rows"),
    [((2, 2), 2, 3, 3), ((2, 2), 2, 100, 9), ((3, 3), 1, 2, 4), ((1, 5), 3, 4, 1)],
)
def test_a_bank_holds_the_newest_frames(grid, chunk, frames, rows, monkeypatch):
    """Evenly spaced places, other ones in the next frame, oldest frame first."""
    world(monkeypatch, grid, chunk)
    recorded = tape(passes(5, noisy=1))
    needs = {"query_bank": {"frames": frames, "rows": rows}}
    tokens = twin.GEOMETRY.tokens
    count = min(rows, tokens)
    for made, found in enumerate(collected(needs, recorded, "query_bank"), 1):
        bank = found[1]
        newest = list(range(made * chunk))[-frames:]
        assert bank.query.shape == (HEADS, len(newest) * count, WIDTH)
        places = bank.place.view(len(newest), count).tolist()
        for own in places:
            assert len(set(own)) == count
            ring = sorted(own)
            gaps = [(b - a) % tokens for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
            assert count == 1 or max(gaps) - min(gaps) <= 1
        if 1 < count < tokens:
            assert all(a != b for a, b in itertools.pairwise(places))
        for head in range(HEADS):
            asked = {(f, p): x for own in clean(recorded, head) for f, p, x in own}
            expected = [asked[f, p] for f, own in zip(newest, places, strict=True) for p in own]
            assert torch.equal(bank.query[head].double(), torch.stack(expected))


def test_over_time_every_place_is_asked():
    bank = collected({"query_bank": {"frames": 8, "rows": 1}}, tape(passes(4)), "query_bank")
    assert sorted(bank[-1][0].place.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


# -- events and bytes ------------------------------------------------------------------------


def test_a_prompt_switch_forgets():
    """What is known afterwards comes from the chunks after it, as if the video had begun there."""
    recorded = tape(passes(4, noisy=1))
    late = [x for x in recorded if x[0].chunk >= 2]
    for name, settings_ in (
        ("query_moments", {"cells": (2, 1), "rate": 0.1}),
        ("query_bank", {"frames": 8, "rows": 2}),
    ):
        found = collected({name: settings_}, recorded, name, switch_at(2))
        fresh = collected({name: settings_}, late, name)
        for a, b in zip(found[2:], fresh, strict=True):
            for one, other in zip(a, b, strict=True):
                for key, value in vars(one).items():
                    same = getattr(other, key)
                    assert torch.equal(value, same) if key != "count" else value == same


def test_right_after_a_prompt_switch_nothing_is_known():
    known = {}

    @dataclass(frozen=True)
    class AtEvent(RetainPart):
        @property
        def needs(self):
            return {"query_moments": {}, "query_bank": {}}

        def event(self, event, views, state):
            if event.kind != "start":
                known[event.kind] = [dict(view.collected) for view in views]

    def event(on, step):
        if step.chunk:
            kind = {1: "scene_cut", 2: "prompt_switch"}[step.chunk]
            on.event(Event(kind, step.start, "other"), step)

    play(session(policy(retain=AtEvent())), tape(passes(3)), event=event)
    assert all(x is not None for own in known["scene_cut"] for x in own.values())
    assert all(x is None for own in known["prompt_switch"] for x in own.values())
    assert len(known["prompt_switch"]) == LAYERS


@pytest.mark.parametrize(
    ("needs", "numbers", "integers"),
    [
        ({}, 0, 0),
        # 2 frames of 3 places, all heads, and the places.
        ({"query_bank": {"frames": 2, "rows": 3}}, HEADS * 6 * WIDTH, 6),
        # Two cells, half as many variances as dimensions, and the cell of each place.
        ({"query_moments": {"cells": (2, 1)}}, HEADS * (2 * WIDTH + WIDTH // 2), 4),
    ],
    ids=["nothing", "bank", "moments"],
)
def test_statistics_are_counted_in_the_bytes(needs, numbers, integers):
    nothing = [None] * LAYERS
    wanted = policy(retain=AskAtCommit(question=lambda views: nothing, wanted=needs))
    without, on = session(policy()), session(wanted)
    for each in (without, on):
        play(each, tape(passes(4)))
    extra = on.held_bytes(0) - without.held_bytes(0)
    assert extra == LAYERS * (4 * numbers + 8 * integers)
    assert on.costs[0].peak_bytes - without.costs[0].peak_bytes == extra


def test_a_statistic_wanted_in_two_ways_is_refused():
    @dataclass(frozen=True)
    class Other(Ask):
        @property
        def needs(self):
            return {"query_bank": {"rows": 2}}

    with pytest.raises(ValueError, match=r"want 'query_bank' with other settings"):
        session(policy(retain=AskAtCommit(wanted={"query_bank": {"rows": 1}}), select=Other()))


# -- the next chunk --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions",
    [
        "absolute",
        "contiguous",
        {"part": "clamp", "lag": 3},
        {"part": "sink-lag", "sink": 2, "lag": 4},
        {"part": "temporal-correction", "window": 4, "sink": 1},
    ],
    ids=str,
)
def test_keys_ahead_are_those_that_the_next_chunk_meets(positions):
    expected, compared = {}, []

    def at_commit(views):
        for view in views:
            coming = view.ahead()
            assert coming.step.frames == tuple(f + 2 for f in view.step.frames)
            assert coming.query is None and coming.step.final == ()
            both = zip(view.groups, coming.read_times, strict=True)
            times = [own.expand(len(group.heads), -1) for group, own in both]
            expected[view.layer] = (coming.read_keys, times)
        return [None] * len(views)

    def in_pass(view):
        if view.layer not in expected or not view.step.opens:
            return
        keys, times = expected[view.layer]
        for group, before, now, time in zip(view.groups, keys, view.read_keys, times, strict=True):
            assert torch.allclose(before, now[:, : len(group)], atol=1e-6)
            assert time.shape == before.shape[:2]
            if not view.cell.rotated:  # raw keys, turned to these times
                angles = view.cell.angles(time, group.expanded("place"))
                raw = torch.view_as_complex(group.payload("k").double().unflatten(-1, (-1, 2)))
                turned = torch.view_as_real(raw * torch.exp(1j * angles)).flatten(-2)
                assert torch.allclose(turned.float(), before, atol=1e-5)
            compared.append(len(group))

    made = policy(
        retain=AskAtCommit(question=at_commit), select=Ask(question=in_pass), positions=positions
    )
    play(session(made), tape(passes(5, noisy=1)))
    assert len(compared) == 4 * LAYERS


def test_a_look_ahead_in_the_middle_of_a_pass_is_refused():
    with pytest.raises(ValueError, match="in the middle of a pass"):
        play(session(policy(select=Ask(question=lambda view: view.ahead()))), tape(passes(1)))


@pytest.mark.parametrize(
    "given",
    [
        False,
        True,
    ],
)
def test_at_an_event_the_next_chunk_is_the_one_that_opens(given):
    """Whether it is about to be made or given as context."""
    seen = []

    @dataclass(frozen=True)
    class AtEvent(RetainPart):
        def event(self, event, views, state):
            if event.kind != "start":
                seen.append((event.frame, views[0].ahead().step.frames))

    steps = list(passes(4))
    if given:
        steps = [replace(step, phase="prefill", opens=True) for step in steps if step.final]
    play(session(policy(retain=AtEvent())), tape(steps), event=switch_at(2))
    assert seen == [(4, (4, 5))]


def test_ragged_heads_are_seen_ahead_too():
    """Groups of other lengths come in the order of the view's groups."""
    found = []
    scattered = Scattered()

    def at_commit(views):
        for view in views:
            for group, keys in zip(view.groups, view.ahead().read_keys, strict=True):
                assert keys.shape == (len(group.heads), len(group), WIDTH)
                found.append(len(group))
        return scattered.decide(views, {})

    play(session(policy(retain=AskAtCommit(question=at_commit))), tape(passes(5, noisy=1)))
    assert len(set(found)) > 3
