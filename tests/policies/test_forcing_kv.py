"""Forcing-KV against plain Python: which segments dynamic heads keep, and what the others keep."""

import math

import pytest
import torch

from lightning_kv import preset
from lightning_kv.cache.decisions import Event, Rebuild
from lightning_kv.policies.registry import policy_from_dict
from lightning_kv.policies.segments import segment_of
from lightning_kv.policies.tables import shipped
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    held_rows,
    random_tape,
    rolling,
)

S, D = "static", "dynamic"
TWO = ((D, S, D), (S, D, D))
THREE = ((D, S, D), (S, S, S), (D, S, D))  # no dynamic head in layer 1: layer 2 decides


class ForcingScript(Script):
    """The method once more: one token, one segment, one head at a time."""

    def __init__(
        self,
        labels,
        frames=3,
        sink=1,
        static_last=1,
        dynamic_last=1,
        segments=6,
        start=1,
        unsplit=1,
    ):
        self.labels, self.frames, self.sink, self.start = labels, frames, sink, start
        self.static, self.dynamic = static_last, dynamic_last
        self.segments, self.unsplit = segments, unsplit
        self.whole, self.known, self.dropped = {}, {}, 0

    def room(self, stream):
        frames = self.frames
        frames = frames[stream.layer][stream.head] if isinstance(frames, list) else frames
        return round(frames * stream.geometry.tokens)

    def pieces(self, tokens):
        """Places of each segment."""
        count = min(self.segments, tokens)
        width = tokens // count
        cut = [list(range(i * width, (i + 1) * width)) for i in range(count)]
        cut[-1] = list(range((count - 1) * width, tokens))
        return cut

    def commit_all(self, streams, step):
        me = streams[0].namespace, streams[0].sample
        tokens = streams[0].geometry.tokens
        whole = self.whole.get(me, []) + [f for f in step.final if f >= self.sink]
        self.whole[me] = whole
        if (step.final[-1] + 1) * tokens <= min(self.room(stream) for stream in streams):
            return
        self.dropped += 1
        split = step.chunk > self.start
        most = max(self.static, self.dynamic)
        if split:
            self.compare(me, streams, step, whole)
        for stream in streams:
            dynamic = self.labels[stream.layer][stream.head] == D
            if not split or stream.layer < self.unsplit:
                kept = whole[-most:]
            else:
                kept = whole[-self.dynamic :] if dynamic else whole[-self.static :]
            pool = self.pool(me, stream, kept) if split and dynamic else set()
            pool = pool if stream.layer >= self.unsplit else set()
            stream.rows = [
                row
                for row in stream.rows
                if row.frame < self.sink or row.frame in kept or (row.frame, row.place) in pool
            ]
        self.whole[me] = whole[-self.dynamic :] if split else whole[-most:]

    def compare(self, me, streams, step, whole):
        layers = sorted({s.layer for s in streams if self.labels[s.layer][s.head] == D})
        layers = [layer for layer in layers if layer >= self.unsplit]
        if not layers:
            return
        asked = [s for s in streams if s.layer == layers[0] and self.labels[s.layer][s.head] == D]
        tables = [{(row.frame, row.place): s.key(row) for row in s.rows} for s in asked]
        for frame in whole[: -self.dynamic]:
            for i, places in enumerate(self.pieces(asked[0].geometry.tokens)):
                found = []
                for place in places:
                    now = torch.cat([table[frame, place] for table in tables])
                    then = torch.cat([table[frame + 1, place] for table in tables])
                    found.append(float(now @ then) / math.sqrt(float(now @ now * (then @ then))))
                self.known.setdefault(me, {})[frame, i] = step.chunk, sum(found) / len(found)

    def pool(self, me, stream, kept):
        cut = self.pieces(stream.geometry.tokens)
        there = {(row.frame, row.place) for row in stream.rows}
        fixed = sum(row.frame < self.sink or row.frame in kept for row in stream.rows)
        room = self.room(stream) - fixed
        most = room * len(cut) // stream.geometry.tokens
        found, taken = set(), 0
        known = self.known.get(me, {})
        for frame, i in sorted(known, key=lambda own: (-known[own][0], known[own][1], own)):
            places = [(frame, place) for place in cut[i] if (frame, place) in there]
            if not places:
                continue
            if len(found) + len(places) > room or taken == most:
                break
            found |= set(places)
            taken += 1
        return found

    def event(self, event, streams, step):
        me = streams[0].namespace, streams[0].sample
        if event.kind != "prompt_switch" or not self.whole.get(me):
            return None
        count = max(self.static, self.dynamic)
        pool = self.room(streams[0]) // streams[0].geometry.tokens - self.sink - self.dynamic
        oldest = max(self.sink, step.start - max(count, pool, self.sink))
        again = list(range(oldest, step.start))
        self.whole[me], self.known[me] = again[-count:], {}
        return Rebuild(tuple(again), hold=tuple(again[-count:]), spare=tuple(range(self.sink)))


def policy(budget="3f", labels=TWO, **settings):
    part = {"part": "forcing-kv", "budget": budget, "labels": labels, **settings}
    return policy_from_dict({"name": "x", "retain": part})


SMALL = {"heads": 3, "layers": 2, "batch": 2}
SWITCHES = (Event("prompt_switch", 6, "a"), Event("prompt_switch", 27, "b"))
TABLE = {"part": "table", "amount": "6f", "shares": [[1, 1, 0.5], [0.5, 1, 0.75]]}
CASES = {
    "the paper's": (3, {}, chunked([3] * 14, noisy=1), {"grid": (2, 3)}),
    "later, tokens that do not divide": (
        5,
        {"start": 3, "segments": 4},
        chunked([3] * 13 + [2], noisy=1),
        {"grid": (2, 5), "batch": 1},
    ),
    "single frames, few tokens": (
        4,
        {},
        chunked([1] * 15, noisy=1),
        {"grid": (1, 4)},
    ),
    "pairs, a longer last part, a given chunk": (
        6,
        {"dynamic_last": 2, "sink": 2, "segments": 3},
        chunked([2] * 14, noisy=1, context=1),
        {"grid": (1, 5)},
    ),
    "fours, three last frames": (
        6,
        {"dynamic_last": 3, "static_last": 2, "segments": 2},
        chunked([4] * 13 + [1], noisy=1),
        {"grid": (1, 4)},
    ),
    "static heads keep more": (
        5,
        {"static_last": 3, "segments": 2},
        chunked([3] * 14, noisy=1),
        {"grid": (1, 4)},
    ),
    "another layer decides": (
        4,
        {"labels": THREE},
        chunked([3] * 14, noisy=1),
        {"layers": 3, "batch": 1, "grid": (2, 3)},
    ),
    "all layers are split": (
        4.5,
        {"unsplit": 0, "start": 0, "sink": 0},
        chunked([1] + [3] * 13, noisy=1),
        {"grid": (2, 2)},
    ),
    "heads with other budgets": (
        [[6, 6, 3], [3, 6, round(4.5)]],
        {"segments": 3, "budget": TABLE},
        chunked([2] * 14, noisy=1),
        {"grid": (1, 3)},
    ),
    "guided": (3, {}, guided(chunked([3] * 13, noisy=1)), {"grid": (1, 3), "batch": 1}),
    "several chunks in flight": (4, {"segments": 2}, rolling(2, 28, 3), {"grid": (1, 2)}),
    "prompt switches": (
        5,
        {"segments": 3, "dynamic_last": 2},
        chunked([3] * 14, noisy=1),
        {"grid": (1, 3), "events": SWITCHES},
    ),
}


def case(name):
    frames, settings, steps, world = CASES[name]
    settings = dict(settings)
    tokens = math.prod(world["grid"])
    budget = settings.pop("budget", None) or f"{round(frames * tokens)}t"
    tape = random_tape(steps, dtype=torch.float64, **SMALL | world)
    labels = settings.pop("labels", TWO)
    return policy(budget, labels, **settings), ForcingScript(labels, frames, **settings), tape


@pytest.mark.parametrize(
    "name", sorted(CASES, key=lambda name: name != "single frames, few tokens")
)
@pytest.mark.thinned(20)
def test_every_decision_is_the_twins(name):
    made, script, tape = case(name)
    found = compare_decisions(made, script, tape)
    assert found.total >= 60 and found.equal == found.total
    assert script.dropped > 8


@pytest.mark.parametrize("name", ["prompt switches", "pairs, a longer last part, a given chunk"])
@pytest.mark.slow
def test_outputs_and_rows_are_the_twins(name):
    assert_same_as_twin(*case(name))


def held(session, layer, head):
    """Frames of one head with the number of their rows."""
    table = session.samples[0].stores["cond"][layer].table
    rows = [int(row.frame) for row in held_rows(table, head)]
    return {frame: rows.count(frame) for frame in sorted(set(rows))}


def test_the_worked_example():
    """Section 3.6 of the released schedule, chunk by chunk; all of chunk 0 still fits."""
    tape, made = (
        random_tape(chunked([3] * 6, noisy=1), grid=(2, 6), heads=2),
        policy(labels=TWO[:1] * 2),
    )
    made = policy(labels=((D, S), (S, D)))
    session, seen = tape.session(made), []
    for step, _ in tape.running(session):
        if step.final:
            seen.append([held(session, *at) for at in ((0, 0), (1, 0), (1, 1))])
    assert seen[0] == [{0: 12, 1: 12, 2: 12}] * 3
    assert seen[1] == [{0: 12, 5: 12}] * 3
    for chunk in range(2, 6):
        first, static, dynamic = seen[chunk]
        last = 3 * chunk + 2
        assert first == static == {0: 12, last: 12}
        assert dynamic.pop(0) == 12 and dynamic.pop(last) == 12
        assert set(dynamic) <= {last - 3, last - 2, last - 1}
        assert sum(dynamic.values()) == 12 and all(n % 2 == 0 for n in dynamic.values())


def test_the_least_alike_segments_stay():
    """One token in each frame is another than in the next."""
    tape = random_tape(chunked([3] * 4, noisy=1), grid=(1, 6), heads=1, layers=2)
    for entry in tape.entries:
        for _, k, _ in entry.layers:
            k[:] = 1.0
            for i, frame in enumerate(entry.step.frames):
                k[:, 6 * i + frame % 6] = -1.0
    made = policy(budget=f"{2 * 6 + 4}t", labels=((D,), (D,)))
    session = tape.session(made)
    for _ in tape.running(session):
        pass
    rows = held_rows(session.samples[0].stores["cond"][1].table, 0)
    pool = {(int(row.frame), int(row.place[1])) for row in rows if 0 < row.frame < 11}
    # 8 and 9 differ at tokens 2 and 3, 9 and 10 at 3 and 4, 10 and 11 at 4 and 5
    assert len(pool) == 4 and pool <= {(8, 2), (8, 3), (9, 3), (9, 4), (10, 4), (10, 5)}


@pytest.mark.parametrize(("tokens", "segments"), [(1560, 6), (16, 6), (5, 6), (7, 3), (1, 4)])
def test_segments_cover_a_frame_and_the_last_takes_the_rest(tokens, segments):
    sizes = segment_of(torch.arange(tokens), tokens, segments).bincount().tolist()
    count = min(segments, tokens)
    assert sizes == [tokens // count] * (count - 1) + [tokens // count + tokens % count]


def test_labels_as_published():
    own = {
        name: shipped()[name].rows for name in ("forcing-kv-self-forcing", "forcing-kv-longlive")
    }
    counts = {name: sum(row.count(S) for row in rows) for name, rows in own.items()}
    assert counts == {"forcing-kv-self-forcing": 134, "forcing-kv-longlive": 154}
    dynamic = [[h for h, kind in enumerate(rows[1]) if kind == D] for rows in own.values()]
    assert dynamic == [[0, 3, 4, 5, 6, 7, 9, 10], [5, 7, 10]]


def test_a_model_without_labels_is_told_what_would_work():
    with pytest.raises(ValueError, match=r"No head table of 'forcing-kv' is shipped for .* Give"):
        preset("forcing-kv").check(random_tape().geometry, 3, 24)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sink": -1}, "sink"),
        ({"segments": 0}, "segments"),
        ({"dynamic_last": 0}, "dynamic_last"),
        ({"labels": [["moving"]]}, r"static \(0\), dynamic \(1\)"),
        ({"labels": "forcing-kv-longliv"}, "Did you mean 'forcing-kv-longlive'"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy(**settings)


def test_a_budget_below_sink_and_last_is_refused():
    with pytest.raises(ValueError, match="must lie between 2f and"):
        policy("1f").check(random_tape(heads=3).geometry, 3, 24)
