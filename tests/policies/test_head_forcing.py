"""Head Forcing against plain Python: local, anchor and memory heads, and the pool of episodes."""

import math

import pytest
import torch

from lightning_kv.cache.decisions import Event
from lightning_kv.policies.episodes import Entries
from lightning_kv.policies.registry import policy_from_dict, preset
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
)
from lightning_kv.testing.twin import Row

L, A, M = "local", "anchor", "memory"
LABELS = ((M, L, M, A), (L, A, L, L), (M, M, M, M))  # no memory head in layer 1


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


class HeadScript(Script):
    """The method once more: one frame of one head at a time."""

    def __init__(self, frames, sink, last, anchor_last=1, rate=0.1, labels=LABELS):
        self.frames, self.sink, self.last, self.labels = frames, sink, last, labels
        self.anchor_last, self.rate = anchor_last, rate
        self.pool, self.summary, self.left = {}, {}, {}

    def commit(self, stream, step):
        made = step.final[-1] + 1
        if made <= self.frames:
            return
        held, kind = sorted({row.frame for row in stream.rows}), self.labels[stream.layer]
        first, newest = held[: self.sink], list(range(made - self.last, made))
        if kind[stream.head] == L:
            kept = newest
        elif kind[stream.head] == A:
            kept = first + list(range(made - self.anchor_last, made))
        else:
            kept = first + self.episodes(stream, held, made) + newest
        stream.rows = [row for row in stream.rows if row.frame in kept]

    def episodes(self, stream, held, made):
        """The pool, once all frames have entered that are among the newest no longer."""
        me = (stream.namespace, stream.sample, stream.layer, stream.head)
        pool, size = self.pool.setdefault(me, []), self.frames - self.sink - self.last
        known = self.left.get(me, [])
        for frame in range(self.sink, made - self.last):
            if frame in pool or frame in known:
                continue
            pool.append(frame)
            while len(pool) > size:
                self.drop(stream, me, pool, size)
        return pool

    def drop(self, stream, me, pool, size):
        of = {f: self.of(stream, f) for f in pool}
        real = [f for f in pool if f != self.summary.get(me)]
        worst = max(real, key=lambda f: (self.redundancy(f, real, of), -f))
        if size and me not in self.summary:
            self.summary[me] = worst
            return
        pool.remove(worst)
        self.left.setdefault(me, []).append(worst)
        if not size:
            return
        target, made = self.summary[me], []
        for place, new in of[worst].items():
            old = of[target][place]
            k, v = (
                self.rate * n + (1 - self.rate) * o for n, o in ((new.k, old.k), (new.v, old.v))
            )
            spot = tuple(map(float, divmod(place, stream.geometry.grid[1])))
            made.append(Row(target, float(target), spot, k, v, new.weight + old.weight))
        stream.rows = [row for row in stream.rows if row.frame != target] + made

    @staticmethod
    def of(stream, frame):
        """The rows of a frame by the number of their place."""
        wide = stream.geometry.grid[1]
        return {
            int(r.place[0] * wide + r.place[1]) if isinstance(r.place, tuple) else r.place: r
            for r in stream.rows
            if r.frame == frame
        }

    @staticmethod
    def redundancy(frame, real, of):
        others = [f for f in real if f != frame]
        if not others:
            return 0.0

        def mean(f):
            rows = [row.k.tolist() for row in of[f].values()]
            return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

        near = min(others, key=lambda f: (abs(f - frame), f))
        alike = [cosine(mean(frame), mean(f)) for f in others]
        places = [cosine(of[frame][p].k.tolist(), of[near][p].k.tolist()) for p in of[frame]]
        return sum(alike) / len(alike) + sum(places) / len(places)

    def time(self, stream, step, row):
        """Side by side, right before the chunk."""
        frames = sorted({r.frame for r in stream.rows}, reverse=True)
        return step.query_times[0] - 1 - frames.index(row.frame)


def policy(budget=None, labels=LABELS, **settings):
    part = {"part": "head-forcing", "budget": budget, "labels": labels, **settings}
    return policy_from_dict({"name": "x", "retain": part, "positions": "contiguous"})


SWITCH = (Event("prompt_switch", 12, "another"), Event("scene_cut", 20))
CASES = {  # budget; frames, sink and newest that it gives; settings of both; steps; world
    "singles": ((6, 1, 2), {}, chunked([1] * 14, noisy=1), {"grid": (3, 2)}),
    "the paper's": ((13, 3, 4), {}, chunked([3] * 14, noisy=1), {"events": SWITCH}),
    "threes": ((9, 2, 3), {"rate": 0.4}, chunked([3] * 13 + [1], noisy=1), {"batch": 2}),
    "pairs, a given chunk": (
        (8, 3, 3), {"first": 3, "last": 3, "anchor_last": 2},
        chunked([2] * 14, noisy=1, context=3), {"grid": (2, 2)},
    ),
    "fours, a pool of one": ((6, 1, 4), {"first": 1, "last": 4}, chunked([4] * 14, noisy=1), {}),
    "no pool": ((5, 2, 3), {"first": 2, "last": 3}, chunked([1] + [3] * 13, noisy=1), {}),
    "no sink": ((7, 0, 2), {"first": 0}, chunked([2] * 14, noisy=1), {"grid": (1, 5)}),
    "guided": ((6, 1, 2), {}, guided(chunked([2] * 14, noisy=1)), {}),
    "several chunks in flight": ((9, 2, 3), {}, rolling(2, 28, 3), {}),
}  # fmt: skip


def pair(case):
    sizes, settings, steps, world = CASES[case]
    script = HeadScript(*sizes, **{k: v for k, v in settings.items() if k not in ("first", "last")})
    return policy(f"{sizes[0]}f", **settings), script, steps, {"grid": (1, 2)} | world


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(20)
def test_every_decision_is_the_twins(case):
    made, script, steps, world = pair(case)
    tape = random_tape(steps, heads=4, layers=3, dtype=torch.float64, **world)
    found = compare_decisions(made, script, tape, ("kept", "read"))
    assert found.equal == found.total >= 200
    assert all(len(left) > 5 for left in script.left.values())
    assert bool(script.summary) == (case != "no pool")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_rows_are_the_twins(case):
    made, script, steps, world = pair(case)
    tape = random_tape(steps, heads=4, layers=3, **world)
    assert_same_as_twin(made, script, tape)


def test_what_each_kind_of_head_holds():
    """The paper's sizes: 3 | 6 | 4 for memory heads, one of the 6 a mean of what has left."""
    tape = random_tape(
        chunked([3] * 8, noisy=0), heads=3, layers=1, grid=(1, 2), dtype=torch.float64
    )
    script = HeadScript(13, 3, 4, labels=((L, A, M),))
    made = policy("13f", labels=[[L, A, M]])
    session, _ = assert_same_as_twin(made, script, tape)
    table = session.samples[0].stores["cond"][0].table
    held = [sorted({*table.frame_id[h, table.valid[h]].tolist()}) for h in range(3)]
    assert held[0] == [20, 21, 22, 23]
    assert held[1] == [0, 1, 2, 23]
    assert held[2][:3] == [0, 1, 2] and held[2][-4:] == [20, 21, 22, 23] and len(held[2]) == 13
    where = ("cond", 0, 0, 2)
    assert set(held[2][3:-4]) == set(script.pool[where])
    summary, left = script.summary[where], script.left[where]
    assert len(left) == 24 - 13  # of the summary's frames one gave it its id
    weight = table.weight[2, table.valid[2]][table.frame_id[2, table.valid[2]] == summary]
    assert weight.tolist() == [12.0, 12.0]
    values = torch.cat([entry.layers[0][2][0] for entry in tape.entries]).transpose(0, 1)
    values = values.unflatten(1, (-1, 2))[2]  # [frames, T, D]
    mean = values[summary]
    for frame in left:
        mean = 0.9 * mean + 0.1 * values[frame]
    rows = table.values()[2, : len(weight) * 13][table.frame_id[2, : len(weight) * 13] == summary]
    torch.testing.assert_close(rows, mean)


def test_entries():
    """Two frames leave when a pool first overflows: one becomes the summary of the other."""
    entries = Entries(3).until(9, 6)
    assert (entries.count, entries.leaves) == (6, ())
    entries = entries.until(12, 6)
    assert entries == Entries(12, 6, True, (10, 10, 11, 12), new=True)
    assert entries.until(15, 6) == Entries(15, 6, True, (13, 14, 15))
    assert entries.until(11, 6) == Entries(12, 6, True, ())  # a share of more leaves more as newest
    assert Entries(3).until(5, 0) == Entries(5, 0, False, (4, 5))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("budget", ["0.3", "14t", "20KiB"])
def test_other_budgets(budget):
    """First frames that a share once gave stay as large; nothing exceeds the budget's frames."""
    tape = random_tape(chunked([3] * 10, noisy=0), heads=4, layers=3, grid=(1, 2))
    session = tape.session(policy(budget))
    for step, _ in tape.running(session):
        if step.final:
            stores = session.samples[0].stores["cond"]
            for store, labels in zip(stores, LABELS, strict=True):
                for head, kind in enumerate(labels):
                    own = store.table.lengths[head] // 2
                    assert own <= max(2, math.floor(0.3 * (step.final[-1] + 1))) or budget != "0.3"
                    assert own <= 7 or budget != "14t"
                    assert own > 0, kind


def test_the_preset_takes_budgets():
    for budget, sizes in (("", (13, 3, 4)), ("@6f", (6, 1, 2)), ("@9f", (9, 2, 3))):
        part = preset(f"head-forcing{budget}").retain
        amount = int(part.budget.amount[:-1])
        assert (amount, round(part.first * amount), round(part.last * amount)) == sizes


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"first": -1}, "first"),
        ({"last": 0}, "last"),
        ({"last": 1.5}, "last"),
        ({"first": 0.5, "last": 0.5}, "leave nothing"),
        ({"anchor_last": 0}, "anchor_last"),
        ({"rate": 2}, "rate"),
        ({"labels": [["both"]]}, r"local \(0\), anchor \(1\), memory \(2\)"),
        ({"labels": [["memory"]]}, "another model"),
        ({"first": 3, "last": 4, "budget": "6f"}, "must lie between 7f"),
        ({"budget": {"part": "table", "amount": "6f", "shares": [[1] * 4] * 3}}, "uniform"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy(**{"budget": "13f"} | settings).check(random_tape(layers=3, heads=4).geometry, 3, 24)
