"""Statistics that parts gather, against explicit weighted sums; and the look at the next chunk."""

import itertools
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from slow import (
    Ask,
    AskAtCommit,
    Scattered,
    passes,
    play,
    policy,
    rolling,
    session,
    sessions,
    tape,
    turn,
    world,
)

from lightning_kv.cache.decisions import Event, Retention
from lightning_kv.cache.passes import Pass
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.statistics import (
    cell_index,
    collected_mass,
    earliest,
    observe_mass,
    summed,
    update_bank,
    update_last_queries,
    update_moments,
)

LAYERS, HEADS, WIDTH = sessions.GEOMETRY.layers, sessions.GEOMETRY.heads, sessions.GEOMETRY.head_dim
CLEAN = {"moments": update_moments, "bank": update_bank}


@dataclass(frozen=True)
class Gather(RetainPart):
    """Gathers with one helper in every pass it is shown; shows views and state at every commit."""

    observes: ClassVar[tuple[str, ...]] = ("prefill", "denoise", "commit")
    columns: ClassVar[dict[str, str]] = {"mass": "sum"}
    update: Any = None
    question: Any = None

    def observe(self, view, state):
        if self.update:
            self.update(view, state)

    def commit(self, views, state):
        return self.question(views, state) if self.question else None

    def event(self, event, views, state):
        if event.kind == "prompt_switch":
            state.clear()


def collected(name, recorded, event=None, **how):
    """The statistic of every layer after every commit."""
    found = []

    def question(views, state):
        found.append([state.get(name, {}).get(view.layer) for view in views])

    helper = CLEAN.get(name, update_last_queries)
    part = Gather(update=partial(helper, **how), question=question)
    play(session(policy(retain=part)), recorded, event=event)
    return found


def clean(recorded, head, layer=1):
    """Queries of one stream that become final in a clean pass: chunk by chunk (frame, place, q)."""
    tokens, chunks = sessions.GEOMETRY.tokens, []
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
    after = collected("moments", recorded, cells=cells, rate=rate, covariance=True)
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
            spread = sum(w * torch.outer(x - mean[c], x - mean[c]) for w, c, x in seen)
            moments = found[1]
            assert moments.count == count and moments.cell.tolist() == where
            expected = torch.stack([mean[c] for c in sorted(mean)])
            torch.testing.assert_close(moments.mean[head].double(), expected, atol=1e-5, rtol=0)
            pairs = spread.diagonal().view(-1, 2).sum(1)  # of a complex pair: both its parts
            torch.testing.assert_close(moments.variance[head].double(), pairs, atol=1e-5, rtol=0)
            both = moments.covariance[head].double()
            torch.testing.assert_close(both, spread, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CLEAN)
def test_only_frames_that_become_final_count(name):
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
    found = collected(name, recorded)[-1][1]
    rows = [x for chunk in clean(recorded, head=2) for _, _, x in chunk]
    assert len(rows) == 3 * 2 * 4
    if name == "moments":
        mean = sum(rows) / len(rows)
        torch.testing.assert_close(found.mean[2, 0].double(), mean, atol=1e-6, rtol=0)
    else:
        ours = {tuple(x) for x in found.query[2].tolist()}
        assert ours == {tuple(x.float().tolist()) for x in rows}


@pytest.mark.parametrize("name", CLEAN)
def test_denoising_passes_tell_nothing(name):
    """Also where they make frames final."""
    for found in collected(name, tape(rolling(3, 2, apart=False))):
        assert found == [None] * LAYERS


@pytest.mark.parametrize("last", [4, 5])
def test_frozen_moments_know_the_frames_before(last):
    """Of a chunk that reaches beyond it none."""
    recorded = tape(passes(4, noisy=1))
    frozen, running = (collected("moments", recorded, until=until) for until in (last, None))
    for chunk in range(4):
        assert torch.equal(frozen[chunk][1].mean, running[min(chunk, 1)][1].mean)
        assert frozen[chunk][1].count == min(chunk + 1, 2)


# -- bank and last queries -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "chunk", "frames", "rows"),
    [((2, 2), 2, 3, 3), ((2, 2), 2, 100, 9), ((3, 3), 1, 2, 4), ((1, 5), 3, 4, 1)],
)
def test_a_bank_holds_the_newest_frames(grid, chunk, frames, rows, monkeypatch):
    """Evenly spaced places, other ones in the next frame, oldest frame first."""
    world(monkeypatch, grid, chunk)
    recorded = tape(passes(5, noisy=1))
    tokens = sessions.GEOMETRY.tokens
    count = min(rows, tokens)
    for made, found in enumerate(collected("bank", recorded, frames=frames, rows=rows), 1):
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
    bank = collected("bank", tape(passes(4)), frames=8, rows=1)
    assert sorted(bank[-1][0].place.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("rows", [3, 8, 11])
def test_the_last_queries_reach_back_into_the_passes_before(rows):
    """As rotated, over noisy passes too; a pass has eight."""
    recorded = tape(passes(3))
    found = collected("last_queries", recorded, rows=rows)
    seen, after = [], []
    for step, layer, q, _, _ in recorded:
        if layer == 1:
            where = [(step.frames[i // 4], i % 4) for i in range(q.shape[1])]
            seen += [turn(x, *at) for x, at in zip(q[0, :, 2], where, strict=True)]
            after += [seen[-rows:]] if step.final else []
    for mine, theirs in zip(found, after, strict=True):
        torch.testing.assert_close(
            mine[1][2].double(), torch.stack(theirs), atol=1e-5, rtol=0, check_dtype=False
        )


# -- attention mass --------------------------------------------------------------------------


def slow_mass(recorded, decay, stays=lambda *row: True, sampled=None, layer=1, head=2):
    """Mass on the rows of one stream after each commit, ``{(frame, place): mass}``."""
    keys, total, after = {}, {}, []
    for step, own, q, k, _ in recorded:
        if own != layer:
            continue
        where = [(step.frames[i // 4], i % 4) for i in range(q.shape[1])]
        flight = {at: turn(x, *at) for x, at in zip(k[0, :, head], where, strict=True)}
        if not step.final:
            continue
        asked = range(len(where)) if sampled is None else sampled
        mass = dict.fromkeys([*keys, *flight], 0.0)
        for i in asked:
            query = turn(q[0, i, head], *where[i])
            logits = {at: float(query @ x) / math.sqrt(WIDTH) for at, x in (keys | flight).items()}
            whole = sum(map(math.exp, logits.values()))
            for at, x in logits.items():
                mass[at] += math.exp(x) / whole * len(where) / len(asked)
        keys |= flight
        total = {at: decay * total.get(at, 0.0) + mass[at] for at in keys}
        after.append(dict(total))
        keys = {at: x for at, x in keys.items() if stays(*at, head, layer)}
        total = {at: x for at, x in total.items() if at in keys}
    return after


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("sampled", [None, 3])
def test_collected_mass_equals_a_slow_sum(decay, ragged, sampled):
    """Over commit passes; also where heads hold other numbers of rows, and of a few queries."""
    found, scattered = [], Scattered()

    def observe(view, state):
        if view.step.final:
            observe_mass(view, state, **({} if sampled is None else {"sampled": sampled}))

    def question(views, state):
        decided = scattered.commit(views, {}) if ragged else [None] * LAYERS
        out = []
        for view, decision in zip(views, decided, strict=True):
            mass = collected_mass(view, state, "mass", decay)
            if view.layer == 1:
                rows = range(view.lengths[2])
                frames, places = (
                    view.frame_id.expand(HEADS, -1)[2],
                    view.raster.expand(HEADS, -1)[2],
                )
                keys = [(int(frames[i]), int(places[i])) for i in rows]
                found.append({at: float(mass[2, i]) for i, at in enumerate(keys)})
            keep = decision.keep if ragged else None
            out.append(Retention(write={"mass": mass}, keep=keep))
        return out

    recorded = tape(passes(4))
    play(session(policy(retain=Gather(update=observe, question=question))), recorded)
    stays = scattered.stays if ragged else lambda *row: True
    asked = None if sampled is None else [0, 4, 7]  # evenly spaced: 0, 3.5 (to the even), 7
    for mine, theirs in zip(found, slow_mass(recorded, decay, stays, asked), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=1e-4)


# -- events and bytes ------------------------------------------------------------------------


def test_after_a_prompt_switch_a_part_that_forgets_begins_anew():
    """What is known afterwards comes from the chunks after it, as if the video had begun there."""
    recorded = tape(passes(4, noisy=1))
    late = [x for x in recorded if x[0].chunk >= 2]
    for name, how in (
        ("moments", {"cells": (2, 1), "rate": 0.1}),
        ("bank", {"frames": 8, "rows": 2}),
    ):
        found = collected(name, recorded, switch_at(2), **how)
        fresh = collected(name, late, **how)
        for a, b in zip(found[2:], fresh, strict=True):
            for one, other in zip(a, b, strict=True):
                for key, value in vars(one).items():
                    same = getattr(other, key)
                    is_tensor = isinstance(value, torch.Tensor)
                    assert torch.equal(value, same) if is_tensor else value == same


def test_an_event_shows_the_state_of_the_passes_before():
    known = {}

    @dataclass(frozen=True)
    class AtEvent(Gather):
        def event(self, event, views, state):
            super().event(event, views, state)
            if event.kind != "start":
                own = [{name: state.get(name, {}).get(v.layer) for name in CLEAN} for v in views]
                known[event.kind] = own

    def both(view, state):
        update_moments(view, state)
        update_bank(view, state)

    def event(on, step):
        if step.chunk:
            kind = {1: "scene_cut", 2: "prompt_switch"}[step.chunk]
            on.event(Event(kind, step.start, "other"), step)

    play(session(policy(retain=AtEvent(update=both))), tape(passes(3)), event=event)
    assert all(x is not None for own in known["scene_cut"] for x in own.values())
    assert all(x is None for own in known["prompt_switch"] for x in own.values())
    assert len(known["prompt_switch"]) == LAYERS


@pytest.mark.parametrize(
    ("update", "numbers", "integers"),
    [
        (None, 0, 0),
        # 2 frames of 3 places, all heads, and the places.
        (partial(update_bank, frames=2, rows=3), HEADS * 6 * WIDTH, 6),
        # Two cells, half as many variances as dimensions, and the cell of each place.
        (partial(update_moments, cells=(2, 1)), HEADS * (2 * WIDTH + WIDTH // 2), 4),
    ],
    ids=["nothing", "bank", "moments"],
)
def test_statistics_are_counted_in_the_bytes(update, numbers, integers):
    without, on = (session(policy(retain=Gather(update=own))) for own in (None, update))
    for each in (without, on):
        play(each, tape(passes(4)))
    extra = on.held_bytes(0) - without.held_bytes(0)
    assert extra == LAYERS * (4 * numbers + 8 * integers)
    assert on.costs[0].peak_bytes - without.costs[0].peak_bytes == extra


def test_a_table_wanted_in_two_ways_is_refused():
    @dataclass(frozen=True)
    class Other(Ask):
        @property
        def needs(self):
            return {"bank": {"rows": 2}}

    @dataclass(frozen=True)
    class One(RetainPart):
        @property
        def needs(self):
            return {"bank": {"rows": 1}}

    with pytest.raises(ValueError, match=r"want 'bank' with other settings"):
        session(policy(retain=One(), select=Other()))


# -- frames and rows -------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=8), st.integers(0, 9))
def test_the_earliest_frames_are_the_first_that_are_there(there, count):
    found = earliest(torch.tensor([there], dtype=torch.bool), count)[0].tolist()
    assert [i for i, yes in enumerate(found) if yes] == [i for i, x in enumerate(there) if x][
        :count
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 4), st.integers(0, 99))
def test_sums_by_bucket_are_those_of_a_loop(heads, rows, count, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, rows, 3, generator=rng, dtype=torch.float64)
    bucket = torch.randint(-1, count, (1 if seed % 2 else heads, rows), generator=rng)
    found = summed(x, bucket, count)
    for h, c in itertools.product(range(heads), range(count)):
        own = [x[h, i] for i in range(rows) if bucket[h % len(bucket), i] == c]
        assert torch.allclose(found[h, c], sum(own, torch.zeros(3, dtype=torch.float64)))


def test_a_layout_finds_every_row_by_frame_and_place():
    """Heads that hold other rows; -1 where there is none; values go there and back."""
    seen = []

    def question(view):
        layout = Layout.of(view)
        rows = layout.row.expand(HEADS, -1, -1)
        frames, places = (x.expand(HEADS, -1) for x in (view.frame_id, view.raster))
        for h in range(HEADS):
            where = {(int(frames[h, i]), int(places[h, i])): i for i in range(view.lengths[h])}
            for f, p in itertools.product(range(len(view.frames)), range(4)):
                assert rows[h, f, p] == where.get((view.frames[f], p), -1)
        assert not layout.extra.any()
        numbers = torch.arange(HEADS * len(view)).view(HEADS, -1).float()
        spread = layout.spread(numbers)
        assert torch.equal(spread != 0, (layout.there & (spread != 0)).expand_as(spread))
        back = layout.at_rows(view, spread)
        assert torch.equal(back[view.valid.expand_as(back)], numbers[view.valid.expand_as(back)])
        seen.append(len(set(view.lengths)))

    play(session(policy(retain=Scattered(), select=Ask(question=question))), tape(passes(4)))
    assert max(seen) > 1


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
@pytest.mark.parametrize("ragged", [False, True])
def test_keys_ahead_are_those_that_the_next_chunk_meets(positions, ragged):
    expected, compared, scattered = {}, [], Scattered()

    def at_commit(views):
        if ragged and views[0].step.chunk == 0:  # the next looks meet ragged heads
            return scattered.commit(views, {})
        for view in views:
            coming = view.ahead()
            assert coming.step.frames == tuple(f + 2 for f in view.step.frames)
            assert coming.query is None and coming.step.final == ()
            assert coming.lengths == view.lengths
            expected[view.layer] = (coming.keys("read"), coming.read_time.expand(HEADS, -1))
        return [None] * len(views)

    def in_pass(view):
        if view.layer not in expected or not view.step.opens:
            return
        keys, times = expected[view.layer]
        assert times.shape == keys.shape[:2]
        torch.testing.assert_close(keys, view.keys("read"), atol=1e-6, rtol=0)
        raw, place = view.keys("raw"), view.place.expand(HEADS, -1, -1)
        for h in range(HEADS):
            for i in range(view.lengths[h]):
                slow = turn(raw[h, i], float(times[h, i]), tuple(place[h, i].tolist()))
                torch.testing.assert_close(keys[h, i].double(), slow, atol=1e-5, rtol=0)
        compared.append(len(set(view.lengths)))

    made = policy(
        retain=AskAtCommit(question=at_commit), select=Ask(question=in_pass), positions=positions
    )
    play(session(made), tape(passes(5, noisy=1)))
    assert len(compared) == (3 if ragged else 4) * LAYERS
    assert (max(compared) > 1) == ragged


def test_a_look_ahead_in_the_middle_of_a_pass_is_refused():
    with pytest.raises(ValueError, match="in the middle of a pass"):
        play(session(policy(select=Ask(question=lambda view: view.ahead()))), tape(passes(1)))


@pytest.mark.parametrize("given", [False, True])
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
