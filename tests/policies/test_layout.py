"""Rows by frame and place, and retention by a score of rows."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow import (
    STORAGE,
    AskAtCommit,
    Scattered,
    agree,
    field,
    held,
    line,
    passes,
    play,
    policy,
    rolling,
    session,
    sessions,
    softmax,
    stores,
    tape,
    turn,
    world,
)

from lightning_kv.cache.decisions import Retention, Sums
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.registry import build_part
from lightning_kv.policies.retain.heavy_hitters import HeavyHitters
from lightning_kv.testing import Script

TOKENS, HEADS = sessions.GEOMETRY.tokens, sessions.GEOMETRY.heads


# -- layout ----------------------------------------------------------------------------------


def twice(view, rows, later=0.0):
    """Copies of some rows at the same frame and place, behind all others."""
    rows = rows.view(1, -1)
    at = [x[:, rows[0]] for x in (view.frame_id.long(), view.time + later, view.place)]
    return Retention(sums=Sums(rows, torch.arange(rows.numel())[None], torch.ones(rows.shape), *at))


def ragged_views(question):
    """Show views whose heads hold other rows, not in the order of frames, to a function."""
    scattered = Scattered()

    def ask(views):
        if views[0].step.chunk == 0:
            return [backwards(view) for view in views]
        if views[0].step.chunk > 1:
            for view in views:
                question(view)
        return scattered.commit(views, {})

    def backwards(view):
        """Every row is replaced by itself, from the last to the first."""
        rows = torch.arange(2 * TOKENS)[None]
        meta = (x.flip(1) for x in (view.frame_id.long(), view.time, view.place))
        sums = Sums(rows, rows.flip(1), torch.ones(1, 2 * TOKENS), *meta)
        return Retention(keep=torch.zeros(1, 2 * TOKENS, dtype=torch.bool), sums=sums)

    play(session(policy(retain=AskAtCommit(question=ask))), tape(passes(5, noisy=1)))


def test_a_layout_names_the_row_at_a_frame_and_place():
    sizes = set()

    def question(view):
        layout = Layout.of(view)
        assert layout.row.shape == (HEADS, len(view.frame_ids), TOKENS)
        assert not layout.extra.any()
        for h in range(view.heads):
            where = {(r["frame_id"], r["place"]): i for i, r in enumerate(held(view, h))}
            for i, f in enumerate(view.frame_ids.tolist()):
                for t in range(TOKENS):
                    assert int(layout.row[h, i, t]) == where.get((f, t), -1)
                    assert bool(layout.there[h, i, t]) == ((f, t) in where)
            sizes.add(len(where))

    ragged_views(question)
    assert len(sizes) > 2


@pytest.mark.parametrize("width", [(), (3,)])
def test_values_go_out_and_come_back(width):
    """What is spread over frames and places is gathered again; elsewhere there are zeros."""
    seen = []

    def question(view):
        layout, rng = Layout.of(view), torch.Generator().manual_seed(view.step.chunk)
        heads = view.heads if view.layer else 1  # values on which all heads agree, too
        values = 1 + torch.rand(heads, len(view), *width, generator=rng)
        spread = layout.spread(values)
        assert spread.shape == (*layout.row.shape, *width)
        assert not spread[~layout.there].any() and spread[layout.there].all()
        back = layout.at_rows(view, spread if not width else spread[..., 1])
        for h in range(view.heads):
            own = line(values, h)
            for row, r in enumerate(held(view, h)):
                i = view.frames.index(r["frame_id"])
                assert torch.equal(spread[h, i, r["place"]], own[row])
                assert back[h, row] == (own[row] if not width else own[row, 1])
                seen.append(h)

    ragged_views(question)
    assert set(seen) == set(range(HEADS))


def test_of_two_rows_at_one_frame_and_place_the_later_is_named():
    """The others are told apart as extra, so that none is taken for a row that is not there."""
    seen = []

    def ask(views):
        if views[0].step.chunk == 0:
            return [twice(view, torch.arange(3)) for view in views]
        for view in views:
            layout = Layout.of(view)
            for h in range(view.heads):
                where = {}
                for i, r in enumerate(held(view, h)):
                    where.setdefault((view.frames.index(r["frame_id"]), r["place"]), []).append(i)
                for (i, t), rows in where.items():
                    assert int(line(layout.row, h)[i, t]) == max(rows)
                extra = {i for rows in where.values() for i in rows[:-1]}
                assert set(line(layout.extra, h).nonzero().flatten().tolist()) == extra
                seen.append(len(extra))
        return Scattered(share=0.8).commit(views, {})

    play(session(policy(retain=AskAtCommit(question=ask))), tape(passes(3, noisy=1)))
    assert max(seen) == 3


# -- rows by score ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ByHash(UnitPart):
    """Scores that look random, other ones for each head; of a frame the sum over its rows."""

    def scores(self, view, state):
        head = torch.arange(view.heads).view(-1, 1)
        rows = hashed(view.frame_id, view.raster, head).float().unsqueeze(1)
        return view.by_frame(rows) if self.unit == "frame" else rows


def hashed(frame, place, head):
    return 1 + (frame * 7 + place * 5 + head * 3) % 11


class ByHashScript(Script):
    def __init__(self, rows, granularity, sink):
        self.budget, self.granularity, self.sink = rows, granularity, sink

    def unit(self, row):
        return row.frame if self.granularity == "frame" else (row.frame, row.place)

    def commit(self, stream, step):
        if len(stream.rows) <= self.budget:
            return
        score, safe = {}, set()
        for r in stream.rows:
            key = self.unit(r)
            score[key] = score.get(key, 0) + hashed(r.frame, r.place, stream.head)
            if r.frame < self.sink or r.frame >= step.final[0]:
                safe.add(key)
        room = self.budget // TOKENS if self.granularity == "frame" else self.budget
        rest = sorted((k for k in score if k not in safe), key=lambda k: (-score[k], k))
        kept = safe | set(rest[: max(0, room - len(safe))])
        stream.rows = [r for r in stream.rows if self.unit(r) in kept]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    ("granularity", "amount", "rows", "sink"),
    [
        ("frame", "4f", 16, 0),
        ("frame", "18t", 18, 1),  # half a frame is no frame
        ("token", "4f", 16, 2),
        ("token", "15t", 15, 0),
        ("token", "12t", 12, 1),  # just what is protected
    ],
)
def test_the_best_units_stay_with_sink_and_newest_chunk(granularity, amount, rows, sink, storage):
    part = ByHash(build_part("budget", {"amount": amount}), granularity, sink)
    script = ByHashScript(rows, granularity, sink)
    on, _ = agree(policy(retain=part, positions=STORAGE[storage]), script, tape(passes(6, noisy=1)))
    least = (sink + 2) * TOKENS  # protected
    room = rows // TOKENS * TOKENS if granularity == "frame" else rows
    for store in stores(on):
        assert set(store.memory.lengths) == {max(least, room)}


def test_a_budget_below_what_is_protected_is_refused():
    part = ByHash(build_part("budget", {"amount": "9t"}), "token", 1)
    with pytest.raises(ValueError, match=r"ByHash.*layer 0, chunk 1.*9t.*larger budget"):
        play(session(policy(retain=part)), tape(passes(3, noisy=1)))


def test_a_budget_per_head_counts_frames_or_their_tokens():
    shares = ((0.5, 1.0, 1.5), (0.75, 1.0, 0.5))
    for granularity in ("frame", "token"):
        budget = build_part("budget", {"part": "table", "amount": "4f", "shares": shares})
        on = session(policy(retain=ByHash(budget, granularity)))
        play(on, tape(passes(6, noisy=1)))
        for store, own in zip(stores(on), shares, strict=True):
            assert store.memory.lengths == tuple(round(4 * x) * TOKENS for x in own)


def test_settings_of_rows_that_cannot_work_are_refused():
    for settings, said in (
        ({"granularity": "row"}, r"granularity='row' .* frame, token"),
        ({"sink": -1}, r"sink=-1 .* 0 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            build_part("retain", {"part": "heavy-hitters", "budget": "4f", **settings})
    made = policy(retain={"part": "heavy-hitters", "budget": "4f", "sink": 3})
    with pytest.raises(ValueError, match="must lie between 5f and 10f"):
        made.check(sessions.GEOMETRY, 2, 12)


# -- heavy hitters ---------------------------------------------------------------------------


class HeavyScript(ByHashScript):
    """Adds up the softmax mass of the queries of clean passes, one query at a time."""

    def look(self, stream, step, q, k):
        if step.phase == "denoise":
            return
        self.fresh_mass = getattr(self, "fresh_mass", {})
        tokens, width = sessions.GEOMETRY.tokens, math.sqrt(len(q[0]))
        place = [(step.frames[i // tokens], i % tokens) for i in range(len(q))]
        keys = [turn(r.k, r.time, r.place) for r in stream.rows]
        keys += [turn(x, *at) for x, at in zip(k, place, strict=True)]
        total = [0.0] * len(keys)
        for x, at in zip(q, place, strict=True):
            query = turn(x, *at)
            shares = softmax([float(query @ key) / width for key in keys])
            total = [t + s for t, s in zip(total, shares, strict=True)]
        for r, extra in zip(stream.rows, total, strict=False):
            r.columns["mass"] += extra
        new = total[len(stream.rows) :]
        self.fresh_mass[id(stream)] = dict(zip(place, new, strict=True))

    def commit(self, stream, step):
        for r in stream.rows:
            if r.frame >= step.final[0]:
                r.columns["mass"] = self.fresh_mass[id(stream)][r.frame, r.place]
        if len(stream.rows) <= self.budget:
            return
        score = {}
        for r in stream.rows:
            score[self.unit(r)] = score.get(self.unit(r), 0.0) + r.columns["mass"]
        safe = {
            self.unit(r) for r in stream.rows if r.frame < self.sink or r.frame >= step.final[0]
        }
        room = (
            self.budget // sessions.GEOMETRY.tokens if self.granularity == "frame" else self.budget
        )
        rest = sorted((k for k in score if k not in safe), key=lambda k: (-score[k], k))
        kept = safe | set(rest[: max(0, room - len(safe))])
        stream.rows = [r for r in stream.rows if self.unit(r) in kept]


@pytest.mark.parametrize(
    ("granularity", "rows", "sink", "storage", "grid", "chunk"),
    [
        ("frame", 16, 0, "raw", (2, 2), 2),
        ("token", 15, 1, "rotated", (2, 2), 2),
        ("token", 13, 0, "rotated", (1, 3), 1),
        ("frame", 10, 1, "rotated", (1, 2), 3),
    ],
)
def test_heavy_hitters_keep_what_was_looked_at(
    granularity, rows, sink, storage, grid, chunk, monkeypatch
):
    world(monkeypatch, grid, chunk)
    retain = {
        "part": "heavy-hitters",
        "budget": f"{rows}t",
        "granularity": granularity,
        "sink": sink,
    }
    on, slow_twin = agree(
        policy(retain=retain, positions=STORAGE[storage]),
        HeavyScript(rows, granularity, sink),
        tape(passes(9 // chunk + 1, noisy=1), batch=2, gain=4.0),
        batch=2,
    )
    held_frames = set()
    for (b, layer, h), stream in slow_twin.streams.items():
        mine = field(stores(on, b)[layer], "mass", h)
        theirs = [r.columns["mass"] for r in stream.rows]
        torch.testing.assert_close(mine, torch.tensor(theirs), atol=1e-4, rtol=0)
        held_frames.add(tuple(sorted({r.frame for r in stream.rows})))
    assert len(held_frames) > 1, "streams should keep different frames"


@dataclass(frozen=True)
class Doubled(HeavyHitters):
    """Some rows are there twice after the second chunk, the copies a little later in time."""

    def commit(self, views, state):
        found = super().commit(views, state)
        if views[0].step.chunk != 1:
            return found
        rows = torch.tensor([0, 2, 5, TOKENS * 2 + 1])
        sums = [twice(view, rows, 0.25).sums for view in views]
        return [replace(own, sums=more) for own, more in zip(found, sums, strict=True)]


class DoubledScript(HeavyScript):
    """Every row counts for itself, whichever frame and place it shares."""

    def unit(self, row):
        return (row.frame, row.place, row.columns.get("copy", 0))

    def commit(self, stream, step):
        super().commit(stream, step)
        if step.chunk == 1:
            for i in (0, 2, 5, TOKENS * 2 + 1):
                row = stream.rows[i].clone(time=stream.rows[i].time + 0.25)
                row.columns["copy"] = 1
                stream.rows.append(row)


@pytest.mark.parametrize("storage", STORAGE)
def test_two_rows_at_one_frame_and_place_are_weighed_apart(storage):
    """Neither is lost unscored, and together they fill two places of the budget."""
    part = Doubled(build_part("budget", {"amount": "23t"}), "token", 1)
    script = DoubledScript(23, "token", 1)
    made = policy(retain=part, positions=STORAGE[storage])
    on, slow_twin = agree(made, script, tape(passes(5, noisy=1), gain=4.0))
    assert all(set(store.memory.lengths) == {23} for store in stores(on))
    rows = [r for stream in slow_twin.streams.values() for r in stream.rows]
    copies = [r for r in rows if r.columns.get("copy")]
    streams = len(slow_twin.streams)
    assert 2 * streams < len(copies) < 4 * streams, "some copies should stay, some go"


def test_heavy_hitters_with_several_chunks_in_flight():
    retain = {"part": "heavy-hitters", "budget": "4f"}
    agree(policy(retain=retain), HeavyScript(16, "frame", 0), tape(rolling(5, 2)))


def test_mass_from_some_queries_is_scaled_to_all():
    """The column adds up to the number of queries, whatever part of them was asked."""
    for queries in (520, 4, 1):
        on = session(policy(retain={"part": "heavy-hitters", "budget": "100f", "queries": queries}))
        play(on, tape(passes(3, noisy=1)))
        for store in stores(on):
            for head in range(HEADS):
                mass = field(store, "mass", head)
                assert float(mass.sum()) == pytest.approx(3 * 2 * TOKENS, rel=1e-5)
        # Every sampled query of a commit pass meets the history once more.
        asked = min(queries, 2 * TOKENS)
        assert on.costs[0].rows_scored == 2 * HEADS * asked * (2 + 4) * TOKENS


# -- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kib", [30, 45])
@pytest.mark.parametrize(
    "retain",
    [
        {"part": "heavy-hitters"},
        {"part": "heavy-hitters", "granularity": "token"},
        {"part": "future", "bank_frames": 4, "redundancy": None},
        {"part": "future", "proxy": "cells", "granularity": "token", "redundancy": None},
    ],
    ids=["h2o", "h2o, tokens", "bank", "cells, tokens"],
)
def test_a_budget_in_bytes_holds_statistics_and_columns_too(retain, kib):
    """What is held never exceeds it, and less than three frames of it are left."""
    made = policy(retain=retain | {"budget": f"{kib}KiB"})
    on = session(made)
    play(on, tape(passes(9, noisy=1)))
    assert on.costs[0].peak_bytes <= kib * 1024
    assert on.costs[0].chunk_bytes[-1] > kib * 1024 - 3 * sessions.GEOMETRY.frame_bytes


def test_tables_of_the_caller_are_no_bytes_of_the_cache():
    """The session does not count them as held, so a budget must not make room for them."""
    lengths = []
    for tables in ({}, {"reference_mass": [torch.zeros(2000)]}):
        on = session(policy(retain={"part": "heavy-hitters", "budget": "45KiB"}), tables=tables)
        play(on, tape(passes(9, noisy=1)))
        lengths.append(stores(on)[0].memory.lengths)
    assert lengths[0] == lengths[1]
