"""Budgets that depend on scores, and budgets in bytes, against plain rules."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from slow import Ask, agree, filling, passes, play, policy, session, sessions, stores, tape, world

from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.registry import build_budget, build_part
from lightning_kv.policies.retain.window import Window
from lightning_kv.testing import Script

TOKENS, HEADS, LAYERS = sessions.GEOMETRY.tokens, sessions.GEOMETRY.heads, sessions.GEOMETRY.layers


# -- more for the heads whose scores are spread ----------------------------------------------


def share_out(streams, amount, safe):
    """The adaptive rule: which units each stream keeps.

    Args:
        streams: For each, a list of (name, score, rows, protected), in the order of the units.
        amount: Rows per stream.
        safe: Share of the amount that every stream gets of its own best.
    """
    first = []
    for units in streams:
        order = sorted(units, key=lambda u: (not u[3], -u[1] if not u[3] else 0))
        sizes = {u[0]: u[2] for u in units}
        own = filling([u[0] for u in order], sizes, round(safe * amount))
        first.append({*own, *(u[0] for u in units if u[3])})
    every = [
        (s, name, score, rows) for s, own in enumerate(streams) for name, score, rows, _ in own
    ]
    every.sort(key=lambda u: (u[1] not in first[u[0]], -u[2] if u[1] not in first[u[0]] else 0))
    sizes = {(s, name): rows for s, name, _, rows in every}
    taken = filling([(s, name) for s, name, *_ in every], sizes, amount * len(streams))
    kept = [set(own) for own in first]
    for s, name in taken:
        kept[s].add(name)
    return kept


def noise(frame, place, head, layer):
    """A score that looks random, in [0, 1); no two are alike."""
    return ((frame * 7919 + place * 10477 + head * 1299 + layer * 15485) * 0.6180339887498949) % 1.0


@dataclass(frozen=True)
class ByNoise(UnitPart):
    """Rows by :func:`noise`, larger in later heads; of a frame the sum over its rows."""

    def scores(self, view, state):
        head = torch.arange(view.heads).view(-1, 1)
        frame, place = view.frame_id.double(), view.raster.double()
        rows = noise(frame, place, head, view.layer) * (1 + 0.5 * head) * (1 + 0.2 * view.layer)
        rows = rows.unsqueeze(1)
        return view.by_frame(rows) if self.unit == "frame" else rows


class AdaptiveScript(Script):
    """The adaptive rule for the twin, over the heads of a layer or of all layers."""

    def __init__(self, rows, safe, over, granularity, sink):
        self.rows, self.safe, self.over = rows, safe, over
        self.granularity, self.sink, self.plan = granularity, sink, {}

    def unit(self, row):
        return row.frame if self.granularity == "frame" else (row.frame, row.place)

    def units(self, stream, step):
        found = {}
        for r in sorted(stream.rows, key=lambda r: (r.frame, r.place)):
            score = noise(r.frame, r.place, stream.head, stream.layer)
            score *= (1 + 0.5 * stream.head) * (1 + 0.2 * stream.layer)
            safe = r.frame < self.sink or r.frame >= step.final[0]
            name = self.unit(r)
            _, old, size, _ = found.get(name, (name, 0.0, 0, safe))
            found[name] = (name, old + score, size + 1, safe)
        return list(found.values())

    def gathered(self, streams, step):
        together = {}
        for stream in streams:
            own = together.setdefault(stream.layer if self.over == "layer" else None, [])
            own.append((stream, self.units(stream, step)))
        for own in together.values():
            kept = share_out([units for _, units in own], self.rows, self.safe)
            self.plan |= {id(s): names for (s, _), names in zip(own, kept, strict=True)}

    def commit(self, stream, step):
        kept = self.plan[id(stream)]
        stream.rows = [r for r in stream.rows if self.unit(r) in kept]


@pytest.mark.parametrize("over", ["layer", "model"])
@pytest.mark.parametrize(
    ("granularity", "amount", "rows", "sink", "safe"),
    [
        ("frame", "4f", 16, 0, 0.2),
        ("frame", "5f", 20, 1, 0.8),
        ("token", "4f", 16, 0, 0.2),
        ("token", "19t", 19, 1, 0.6),
        ("token", "4f", 16, 0, 0.0),
        ("frame", "4f", 16, 0, 1.0),
    ],
)
@pytest.mark.thinned(2)
def test_heads_share_what_scores_best_over_all_of_them(over, granularity, amount, rows, sink, safe):
    """A safe share of each head's own best, then the best of all, up to heads x amount."""
    budget = build_budget({"part": "adaptive", "amount": amount, "over": over, "safe": safe})
    made = policy(retain=ByNoise(budget, granularity, sink))
    script = AdaptiveScript(rows, safe, over, granularity, sink)
    on, _ = agree(made, script, tape(passes(6, noisy=1), batch=2), batch=2)
    lengths = [store.memory.lengths for store in stores(on)]
    assert sum(map(sum, lengths)) <= LAYERS * HEADS * rows
    if over == "layer":
        assert all(sum(own) <= HEADS * rows for own in lengths)
        if granularity == "token":
            assert all(sum(own) == HEADS * rows for own in lengths)
    if safe < 1:
        assert len({n for own in lengths for n in own}) > 1, "heads should keep different numbers"


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_adaptive_rule(data):
    """Units of any size, held in part or not at all, protected or not."""
    count = data.draw(st.integers(1, 6))
    each = {"min_size": count, "max_size": count}
    frames, safe = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    draw = data.draw(st.permutations(range(3 * count)))
    size = [data.draw(st.lists(st.integers(0, 4), **each)) for _ in range(HEADS)]
    guard = [data.draw(st.lists(st.booleans(), **each)) for _ in range(HEADS)]
    guard = [
        [g and s > 0 for g, s in zip(*own, strict=True)] for own in zip(guard, size, strict=True)
    ]
    score = [draw[h * count : (h + 1) * count] for h in range(HEADS)]

    class Look:
        geometry, heads, layer = sessions.GEOMETRY, HEADS, 0

    part = build_budget({"part": "adaptive", "amount": f"{frames}f", "safe": safe})
    tensors = (torch.tensor(x).unsqueeze(1) for x in (score, size, guard))
    scores, sizes, protected = tensors
    (found,) = part.lengths([Look()], [scores.double()], [sizes], [protected], {})
    streams = [
        [(u, score[h][u], size[h][u], guard[h][u]) for u in range(count) if size[h][u]]
        for h in range(HEADS)
    ]
    kept = share_out(streams, frames * TOKENS, safe)
    assert found[:, 0].tolist() == [sum(size[h][u] for u in own) for h, own in enumerate(kept)]


@pytest.mark.parametrize("each", [False, True])
def test_reads_are_shared_among_heads_too(each):
    """Each query frame has its own share."""
    seen = set()

    def question(view):
        if view.step.chunk < 3:
            return
        budget = build_budget({"part": "adaptive", "amount": "2f"})
        settings = {"part": "top-attention", "budget": budget, "per_query_frame": each}
        part = build_part("select", settings)
        scores = part.scores(view, {}).tolist()
        chosen = part.pick(view, {}).frames
        for q in range(2 if each else 1):
            streams = [[(f, s, TOKENS, False) for f, s in enumerate(own[q])] for own in scores]
            for h, kept in enumerate(share_out(streams, 2 * TOKENS, 0.2)):
                assert set(chosen[h, q].nonzero().flatten().tolist()) == kept
                seen.add(len(kept))

    play(session(policy(select=Ask(question=question))), tape(passes(5, noisy=1), gain=3.0))
    assert len(seen) > 1


# -- bytes -----------------------------------------------------------------------------------


def held_frames(on):
    (lengths,) = {x for store in stores(on) for x in store.memory.lengths}
    return lengths / sessions.GEOMETRY.tokens


def byte_drive(precision, amount, chunks, retain="window", **settings):
    """A session after a drive, and the most bytes that it held at any time."""
    made = policy(retain={"part": retain, "budget": amount, **settings}, precision=precision)
    on, held = session(made), []
    finish = on.finish

    def close(step):
        answer = finish(step)
        held.append(on.held_bytes(0))
        return answer

    on.finish = close
    play(on, tape(passes(chunks, noisy=1)), check=lambda step: held.append(on.held_bytes(0)))
    return on, max(held)


@pytest.mark.parametrize("retain", ["window", "heavy-hitters"])
@pytest.mark.thinned(2)
def test_a_budget_in_bytes_holds_more_frames_in_fewer_bits(retain, monkeypatch):
    """And what is held stays within it, in every pass and after every commit."""
    world(monkeypatch, (6, 6), known=True)
    rows = 36 * HEADS * LAYERS  # of a frame
    vectors = {"as-computed": 12 * 4, "int8": 12 + 4, "int4": 6 + 4}  # a scale of 4 bytes
    frames = {}
    for name, vector in vectors.items():
        precision = name if name == "as-computed" else {"part": "aged", "codec": name}
        on, most = byte_drive(precision, "1MiB", 60, retain)
        assert most <= 2**20, (name, most)
        assert max(on.costs[0].chunk_bytes) <= 2**20
        frames[name] = held_frames(on)
        assert frames[name] < 120, "the budget should bind"
        if retain == "window":  # keys, values and fields; two frames in flight as computed
            left = 2**20 - 2 * rows * (2 * 48 + 20)
            assert frames[name] == left // (rows * (2 * vector + 20))
    assert frames["as-computed"] < frames["int8"] < frames["int4"]


@pytest.mark.parametrize("age", [2, 5])
def test_frames_that_are_too_young_for_a_codec_count_as_computed(age, monkeypatch):
    world(monkeypatch, (6, 6), known=True)
    frames = []
    for own in (0, age):
        precision = {"part": "aged", "codec": "int4", "age": own}
        on, most = byte_drive(precision, "512KiB", 36)
        assert most <= 2**19
        frames.append(held_frames(on))
    assert frames[1] < frames[0] < 72


@pytest.mark.parametrize("age", [0, 3])
@pytest.mark.parametrize("codec", ["int8", "int4", "kivi", "quant-video-gen", "budget-pca"])
@pytest.mark.thinned(3)
def test_rows_that_go_one_by_one_free_what_a_budget_counts_on(codec, age, monkeypatch):
    """Whatever is dropped of rows that were encoded together, what is left stays within it."""
    world(monkeypatch, (4, 4), known=True)
    precision = {"part": "aged", "codec": codec, "age": age}
    settings = {"granularity": "token", "bank_frames": 4}
    on, most = byte_drive(precision, "128KiB", 24, "future", **settings)
    assert stores(on)[0].memory.lengths[0] < 48 * 16, "the budget should bind"
    assert most <= 128 * 2**10


@dataclass(frozen=True)
class Learned(Window):
    """A window with something in its state."""

    width: int = 0

    def fresh(self):
        """A network, a table and a view of it."""
        if not self.width:
            return {}
        table = torch.zeros(self.width)
        net = torch.nn.Sequential(torch.nn.Linear(self.width, 3), torch.nn.BatchNorm1d(3))
        return {"net": net, "table": table, "more": [{"part": table[2:]}], "name": "learned"}


def bytes_of(width):
    """Weights and biases of both layers, two running means and a counter; the table once."""
    return 4 * (3 * width + 3 + 3 + 3 + 3 + 3) + 8 + 4 * width


def test_parameters_in_a_state_count_as_held_bytes():
    found = {}
    for width in (0, 100):
        on = session(policy(retain=Learned(width=width)))
        play(on, tape(passes(2, noisy=1)))
        found[width] = on.held_bytes(0), on.costs[0].chunk_bytes[-1]
    assert found[100][0] - found[0][0] == bytes_of(100)
    assert found[100][1] - found[0][1] == bytes_of(100)


def test_a_state_is_taken_off_a_budget_in_bytes_first():
    width, frames = 1200, {}
    amount = Amount.parse("64KiB")
    for own in (0, width):
        part = Learned(budget=build_budget("64KiB"), width=own)
        on = session(policy(retain=part))
        play(on, tape(passes(16, noisy=1)))
        assert max(on.costs[0].chunk_bytes) <= amount.value
        frames[own] = held_frames(on)
    one = sessions.GEOMETRY.frame_bytes
    assert frames[0] == (amount.value - 2 * one) // one
    assert frames[width] == (amount.value - 2 * one - bytes_of(width)) // one
