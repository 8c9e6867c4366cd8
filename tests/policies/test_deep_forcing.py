"""Deep Forcing and its sink against plain Python, and the paper's two worked examples."""

import math

import pytest
import torch

from lightning_kv import preset
from lightning_kv.cache.decisions import Event
from lightning_kv.policies.registry import load_policy
from lightning_kv.testing import (
    Script,
    assert_same_as_twin,
    chunked,
    compare_decisions,
    guided,
    random_tape,
    rolling,
)


def sink_of(sink, budget):
    """Whole numbers are frames."""
    return sink if isinstance(sink, int) else math.floor(sink * budget + 0.5)


class DeepSinkScript(Script):
    """A rolling window behind a sink that starts one window before the next chunk."""

    def __init__(self, budget, sink=0.667):
        self.budget, self.sink, self.events = budget, sink_of(sink, budget), 0

    def commit(self, stream, step):
        frames = sorted({row.frame for row in stream.rows})
        if len(frames) <= self.budget:
            return
        first = [f for f in frames if f < self.sink]
        kept = first + [f for f in frames if f not in first][len(first) - self.budget :]
        stream.rows = [row for row in stream.rows if row.frame in kept]
        start = max(0, step.final[-1] + 1 - (self.budget + stream.geometry.chunk))
        stream.rows = [
            row.clone(time=float(start + row.frame)) if row.frame < self.sink else row
            for row in stream.rows
        ]
        self.events += 1


class DeepScript(Script):
    """All queries that were ever asked in a list, every row with every one of the last."""

    def __init__(self, budget, sink=0.55, recent=4, capacity=None, reuse=7, fusion="sum"):
        self.budget, self.sink, self.recent = budget, sink_of(sink, budget), recent
        self.left, self.reuse, self.fusion = capacity or budget, reuse, fusion
        self.asked, self.events, self.tired = {}, 0, 0

    @staticmethod
    def key(stream):
        return stream.namespace, stream.sample, stream.layer, stream.head

    def fresh(self, row):
        return row.clone(columns={"reused": 0.0})

    def look(self, stream, step, q, k):
        if not step.rebuild and not step.opens:
            self.note(stream)

    def note(self, stream):
        fifo = self.asked.setdefault(self.key(stream), [])
        fifo += [query.turned for query in stream.queries]

    def open_all(self, streams, step):
        for stream in streams:
            self.note(stream)
        tokens, count = streams[0].geometry.tokens, len(streams[0].rows)
        if count <= self.budget * tokens:
            return
        flight = max(len(step.frames), streams[0].geometry.chunk)
        first_recent = step.frames[0] - max(self.recent - flight, 0)
        scores = [0.0] * count
        for stream in streams:
            last = self.asked[self.key(stream)][-self.recent * tokens :]
            keys = [stream.key(row) for row in stream.rows]
            for i, key in enumerate(keys):
                scores[i] += float(sum(query @ key for query in last))
        if self.fusion == "max":
            scores = [self.best(streams, i, tokens) for i in range(count)]
        names = list(streams[0].rows)
        safe = [i for i, r in enumerate(names) if r.frame < self.sink or r.frame >= first_recent]
        open_ = [i for i in range(count) if i not in safe]
        fresh = [i for i in open_ if not self.reuse or names[i].columns["reused"] < self.reuse]
        self.tired += len(open_) - len(fresh)
        left = self.left if self.left + flight <= self.budget else self.budget
        left = max(left, self.sink + max(self.recent - flight, 0))
        room = left * tokens - len(safe)
        won = sorted(fresh, key=lambda i: (-scores[i], i))[:room]
        start = max(0.0, step.frames[0] - (left + flight))
        for stream in streams:
            rows = []
            for i, row in enumerate(stream.rows):
                if i in won:
                    row.columns["reused"] += 1
                if row.frame < self.sink:
                    row = row.clone(time=start + row.frame)
                if i in won or i in safe:
                    rows.append(row)
            stream.rows = rows
        self.events += 1

    def best(self, streams, i, tokens):
        """The largest sum over heads of any query's product with row i."""
        sums = [0.0] * min(self.recent * tokens, len(self.asked[self.key(streams[0])]))
        for stream in streams:
            last, key = self.asked[self.key(stream)][-len(sums) :], stream.key(stream.rows[i])
            sums = [total + float(query @ key) for total, query in zip(sums, last, strict=True)]
        return max(sums)


def policy(part, budget, **settings):
    return load_policy({"name": "x", "retain": {"part": part, "budget": f"{budget}f", **settings}})


BOTH = "kept", "read"
WORLD = {"heads": 2, "batch": 2, "grid": (1, 2)}
SWITCH = (Event("prompt_switch", 12, "another"), Event("scene_cut", 20))
# Settings, budget, passes, world. 14 chunks each.
CASES = {
    "threes, an event at every chunk": (
        {"sink": 1}, 9, chunked([3] * 14, noisy=1), WORLD | {"layers": 1},
    ),
    "slack": ({"capacity": 5, "sink": 0.4}, 9, chunked([2] * 14, noisy=1), WORLD),
    "single frames": ({"recent": 3}, 6, chunked([1] * 14, noisy=1), WORLD | {"grid": (3, 2)}),
    "fours, a short last chunk": (
        {"capacity": 7}, 9, chunked([4] * 13 + [1], noisy=1), WORLD | {"batch": 1},
    ),
    "max, rows that tire": (
        {"fusion": "max", "reuse": 1, "sink": 2}, 7, chunked([2] * 14, noisy=1),
        WORLD | {"batch": 1, "heads": 3},
    ),
    "no limit, other first chunk, events": (
        {"reuse": 0}, 8, chunked([1] + [3] * 13, noisy=1), WORLD | {"events": SWITCH},
    ),
    "guided, given chunks": (
        {"sink": 0}, 5, guided(chunked([2] * 14, noisy=1, context=2)), WORLD | {"batch": 1},
    ),
    "several chunks in flight": ({}, 6, rolling(2, 28, 2), WORLD | {"batch": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(8)
def test_every_decision_is_the_twins(case):
    """In float64, so that no rounding decides between two rows."""
    settings, budget, steps, world = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, **world)
    script = DeepScript(budget, **settings)
    found = compare_decisions(policy("deep-forcing", budget, **settings), script, tape, BOTH)
    assert found.equal == found.total >= 200
    assert script.events > 4 * len(script.asked) / world["heads"]
    assert script.tired or "tire" not in case


@pytest.mark.slow
@pytest.mark.parametrize("case", ["slack", "max, rows that tire"])
def test_outputs_and_rows_are_the_twins(case):
    """Times and counters of all held rows too."""
    settings, budget, steps, world = CASES[case]
    tape = random_tape(steps[:20], **world | {"batch": 1, "layers": 1})
    script = DeepScript(budget, **settings)
    assert_same_as_twin(policy("deep-forcing", budget, **settings), script, tape)


SINKS = {
    "threes": (0.667, 9, chunked([3] * 14, noisy=1), WORLD),
    "single frames": (2, 5, chunked([1] * 14, noisy=1), WORLD | {"grid": (3, 1)}),
    "short last chunk, given": (0.5, 7, chunked([4] * 13 + [2], noisy=1, context=1), WORLD),
    "guided, events": (0.4, 6, guided(chunked([2] * 14, noisy=1)), WORLD | {"events": SWITCH}),
    "several chunks in flight": (0.667, 6, rolling(2, 28, 3), WORLD),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SINKS)
def test_the_sink_alone_is_the_twins(case):
    sink, budget, steps, world = SINKS[case]
    script, own = DeepSinkScript(budget, sink), policy("deep-sink", budget, sink=sink)
    tape = random_tape(steps, dtype=torch.float64, **world)
    found = compare_decisions(own, script, tape, BOTH)
    assert found.equal == found.total >= 200 and script.events
    small = random_tape(steps[:20], **world | {"batch": 1, "layers": 1})
    assert_same_as_twin(own, DeepSinkScript(budget, sink), small)


def read_in_first_passes(own, chunks, **world):
    """By first frame of a chunk: rows of each frame that are read, and the time of frame 0."""
    found = {}
    tape = random_tape(chunked([3] * chunks, noisy=1), layers=1, heads=2, grid=(1, 2), **world)

    def watch(view):
        if view.step.opens:
            count = dict(zip(view.frames, view.rows_per_frame[0].tolist(), strict=True))
            found[view.step.start] = count, float(view.time[0, 0]) if len(view) else None

    tape.play(tape.session(own, watch=watch))
    return found


def test_the_worked_example_of_a_window_of_21_compressed_to_16():
    seen = read_in_first_passes(preset("deep-forcing"), 11)
    for start in range(0, 21, 3):
        assert list(seen[start][0]) == list(range(start))
    first, time = seen[21]
    assert list(first)[:10] == list(range(10)) and list(first)[-1] == 20 and time == 5.0
    middle = {f: n for f, n in first.items() if 10 <= f < 20}
    assert sum(middle.values()) == 2 * 2 and sum(first.values()) == 13 * 2
    between, time = seen[24]
    assert between == first | {21: 2, 22: 2, 23: 2} and time == 5.0
    again, time = seen[27]
    assert sum(again.values()) == 13 * 2 and again[26] == 2 and time == 11.0
    assert set(again) - set(range(10)) <= {*middle, *range(20, 27)}


def test_the_worked_example_of_twelve_frames():
    """An event at every chunk; the first one does not move the sink."""
    own = policy("deep-forcing", 9, sink=1)
    seen = read_in_first_passes(own, 8)
    rows, time = seen[12]
    assert rows[0] == rows[11] == 2 and time == 0.0 and sum(rows.values()) == 9 * 2
    for start in (15, 18, 21):
        rows, time = seen[start]
        assert time == start - 12 and sum(rows.values()) == 9 * 2 and rows[start - 1] == 2


def test_settings_follow_the_budget():
    """At 9f the published setting has a sink of 5 frames, and an event at every chunk."""
    seen = read_in_first_passes(preset("deep-forcing@9f"), 7)
    for start in (12, 15, 18):
        rows, time = seen[start]
        assert [rows[f] for f in range(5)] == [2] * 5 and sum(rows.values()) == 9 * 2
        assert time == start - 12


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sink": 1.5}, "neither frames nor a share"),
        ({"sink": -1}, "neither frames nor a share"),
        ({"fusion": "mean"}, "Use one of: sum, max"),
        ({"recent": 0}, "recent"),
        ({"capacity": 0}, "capacity"),
        ({"reuse": -1}, "reuse"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy("deep-forcing", 9, **settings)


def test_heads_of_other_lengths_are_refused():
    budget = {"part": "table", "amount": "9f", "shares": [[1, 0.5, 1]] * 2}
    own = load_policy({"name": "x", "retain": {"part": "deep-forcing", "budget": budget}})
    tape = random_tape()
    with pytest.raises(ValueError, match=r"all heads of a layer together, .* Use a uniform"):
        own.check(tape.geometry, 3, 24)
