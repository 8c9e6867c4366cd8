"""Rows by frame and place, and retention by a score of rows."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from slow import (
    STORAGE,
    AskAtCommit,
    Scattered,
    Watching,
    agree,
    held,
    play,
    policy,
    rolling,
    session,
    softmax,
    tape,
    turn,
    twin,
    world,
)
from twin import passes

from lightning_kv.cache.decisions import Merge, Retention
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.presets import build_part
from lightning_kv.policies.rowwise import RowScoredPart

TOKENS, HEADS = twin.GEOMETRY.tokens, twin.GEOMETRY.heads


# -- layout ----------------------------------------------------------------------------------


def ragged_views(question):
    """Show views whose heads hold other rows, not in the order of frames, to a function."""
    scattered = Scattered()

    def ask(views):
        if views[0].step.chunk == 0:
            return [backwards(view) for view in views]
        if views[0].step.chunk > 1:
            for view in views:
                question(view)
        return scattered.decide(views, {})

    def backwards(view):
        """Every row is replaced by itself, from the last to the first."""
        rows = torch.arange(2 * TOKENS)
        meta = (view.column(name)[0].flip(0) for name in ("frame_id", "time", "place"))
        return Retention(keep=rows[:0], merge=Merge(rows, rows.flip(0), torch.ones(8), *meta))

    play(session(policy(retain=AskAtCommit(question=ask))), tape(passes(5, noisy=1)))


def test_a_layout_names_the_row_at_a_frame_and_place():
    sizes = set()

    def question(view):
        layout = Layout.of(view)
        assert layout.frame_ids.tolist() == view.frame_ids.tolist()
        assert layout.row.shape == (HEADS, len(view.frame_ids), TOKENS)
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
        values = [1 + torch.rand(len(g.heads), len(g), *width, generator=rng) for g in view.groups]
        spread = layout.spread(view, values)
        assert spread.shape == (*layout.row.shape, *width)
        assert not spread[~layout.there].any() and spread[layout.there].all()
        for group, own in zip(view.groups, values, strict=True):
            flat = spread if not width else spread[..., 1]
            back = layout.gather(view, group, flat)
            assert torch.equal(back, own if not width else own[..., 1])
            for position, h in enumerate(group.heads):
                for row, x in enumerate(own[position]):
                    frame = group.expanded("frame_id")[position, row]
                    i = int((view.frame_ids == frame).nonzero())
                    place = int(group.expanded("place")[position, row])
                    assert torch.equal(spread[h, i, place], x)
                    seen.append(h)

    ragged_views(question)
    assert set(seen) == set(range(HEADS))


def test_kept_places_become_row_indices():
    def question(view):
        layout = Layout.of(view)
        rng = torch.Generator().manual_seed(view.step.chunk + view.layer)
        kept = torch.rand(layout.row.shape, generator=rng) < 0.5
        for h, rows in enumerate(layout.rows(kept)):
            ids = view.frame_ids.tolist()
            own = [
                i
                for i, r in enumerate(held(view, h))
                if kept[h, ids.index(r["frame_id"]), r["place"]]
            ]
            assert rows.tolist() == own

    ragged_views(question)


# -- rows by score ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ByHash(RowScoredPart):
    """Scores that look random, other ones for each head."""

    def row_scores(self, view, layout):
        frame = layout.frame_ids.view(1, -1, 1)
        place = torch.arange(layout.row.shape[2]).view(1, 1, -1)
        head = torch.arange(view.heads).view(-1, 1, 1)
        return hashed(frame, place, head).float() * layout.there


def hashed(frame, place, head):
    return 1 + (frame * 7 + place * 5 + head * 3) % 11


class ByHashScript(Watching):
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
        ("token", "9t", 9, 1),  # less than what is protected: that stays
    ],
)
def test_the_best_units_stay_with_sink_and_newest_chunk(granularity, amount, rows, sink, storage):
    part = ByHash(build_part("budget", {"amount": amount}), granularity, sink)
    script = ByHashScript(rows, granularity, sink)
    on, _ = agree(policy(retain=part, positions=STORAGE[storage]), script, tape(passes(6, noisy=1)))
    least = (sink + 2) * TOKENS  # protected
    room = rows // TOKENS * TOKENS if granularity == "frame" else rows
    for cell in on.lanes["cond", 0].cells:
        assert set(cell.memory.lengths.values()) == {max(least, room)}


def test_a_budget_per_head_counts_frames_or_their_tokens():
    shares = ((0.5, 1.0, 1.5), (0.75, 1.0, 0.5))
    for granularity in ("frame", "token"):
        budget = build_part("budget", {"part": "table", "amount": "4f", "shares": shares})
        on = session(policy(retain=ByHash(budget, granularity)))
        play(on, tape(passes(6, noisy=1)))
        for cell, own in zip(on.lanes["cond", 0].cells, shares, strict=True):
            assert cell.memory.lengths == {h: round(4 * x) * TOKENS for h, x in enumerate(own)}


def test_settings_of_rows_that_cannot_work_are_refused():
    for settings, said in (
        ({"granularity": "row"}, r"granularity='row' .* frame, token"),
        ({"sink": -1}, r"sink=-1 .* 0 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            build_part("retain", {"part": "heavy-hitters", "budget": "4f", **settings})
    made = policy(retain={"part": "heavy-hitters", "budget": "4f", "sink": 3})
    with pytest.raises(ValueError, match="must lie between 5f and 10f"):
        made.check(twin.GEOMETRY, 2, 12)


# -- heavy hitters ---------------------------------------------------------------------------


class HeavyScript(ByHashScript):
    """Adds up the softmax mass of the queries of clean passes, one query at a time."""

    def look(self, stream, step, q, k):
        if step.phase == "denoise":
            return
        self.fresh_mass = getattr(self, "fresh_mass", {})
        tokens, width = twin.GEOMETRY.tokens, math.sqrt(len(q[0]))
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
        room = self.budget // twin.GEOMETRY.tokens if self.granularity == "frame" else self.budget
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
        mine = on.lanes["cond", b].cells[layer].memory.column("mass")[h]
        theirs = [r.columns["mass"] for r in stream.rows]
        torch.testing.assert_close(mine, torch.tensor(theirs), atol=1e-4, rtol=0)
        held_frames.add(tuple(sorted({r.frame for r in stream.rows})))
    assert len(held_frames) > 1, "streams should keep different frames"


def test_heavy_hitters_with_several_chunks_in_flight():
    retain = {"part": "heavy-hitters", "budget": "4f"}
    agree(policy(retain=retain), HeavyScript(16, "frame", 0), tape(rolling(5, 2)))


def test_mass_from_some_queries_is_scaled_to_all():
    """The column adds up to the number of queries, whatever part of them was asked."""
    for queries in (520, 4, 1):
        on = session(policy(retain={"part": "heavy-hitters", "budget": "100f", "queries": queries}))
        play(on, tape(passes(3, noisy=1)))
        for cell in on.lanes["cond", 0].cells:
            for mass in cell.memory.column("mass"):
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
    assert on.costs[0].chunk_bytes[-1] > kib * 1024 - 3 * twin.GEOMETRY.frame_bytes


def test_tables_of_the_caller_are_no_bytes_of_the_cache():
    """The session does not count them as held, so a budget must not make room for them."""
    lengths = []
    for tables in ({}, {"reference_mass": torch.zeros(2000)}):
        on = session(policy(retain={"part": "heavy-hitters", "budget": "45KiB"}), tables=tables)
        play(on, tape(passes(9, noisy=1)))
        lengths.append(on.lanes["cond", 0].cells[0].memory.lengths)
    assert lengths[0] == lengths[1]
