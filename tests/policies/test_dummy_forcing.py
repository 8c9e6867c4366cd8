"""Dummy Forcing against plain Python: which head is of which kind, and what it keeps."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_kv import preset
from lightning_kv.cache.decisions import Event, Rebuild
from lightning_kv.policies.registry import policy_from_dict
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


class DummyScript(Script):
    """The method once more: one query, one row, one head at a time."""

    def __init__(self, dummy=0.5, ar_start=1, first_tokens="frame", queries=520, window=12):
        self.dummy, self.ar_start, self.paper = dummy, ar_start, first_tokens == "paper"
        self.queries, self.window = queries, window
        self.mass, self.kind, self.newest, self.again = {}, {}, {}, set()

    def look(self, stream, step, q, k):
        if step.rebuild or not step.final or step.chunk != self.ar_start:
            return
        queries = [query for query in stream.queries if query.frame in step.final]
        if len(queries) > self.queries:
            gap = (len(queries) - 1) / max(1, self.queries - 1)
            queries = [queries[round(i * gap)] for i in range(self.queries)]
        oldest = sorted({row.frame for row in stream.rows})
        oldest = oldest[: len(step.final) if self.paper and self.ar_start > 1 else 1]
        first = mid = 0.0
        for query in queries:
            every = stream.logits(query, stream.rows + stream.flight)
            top = max(every)
            total = sum(math.exp(x - top) for x in every)
            for row, x in zip(stream.rows, every, strict=False):
                share = math.exp(x - top) / total
                first, mid = (first + share, mid) if row.frame in oldest else (first, mid + share)
        self.mass[self.key(stream)] = first, mid

    def commit_all(self, streams, step):
        self.newest[self.sample(streams[0])] = step.final[0]
        if step.chunk == self.ar_start:
            self.tell_apart(streams)
        for stream in streams:
            self.split(stream)

    def tell_apart(self, streams):
        found = [self.mass[self.key(stream)] for stream in streams]
        totals = [sum(own[i] for own in found) or 1.0 for i in (0, 1)]
        shares = [(first / totals[0], mid / totals[1]) for first, mid in found]
        order = sorted(range(len(streams)), key=lambda i: (max(shares[i]), i))
        dummies = order[: math.floor(self.dummy * len(streams) + 0.5)]
        for i, stream in enumerate(streams):
            other = "mid" if shares[i][0] < shares[i][1] else "first"
            self.kind[self.key(stream)] = "dummy" if i in dummies else other

    def split(self, stream):
        frames = sorted({row.frame for row in stream.rows})
        chunk = [f for f in frames if f >= self.newest[self.sample(stream)]]
        kept = {
            None: [frames[0], *chunk],
            "first": frames[:1],
            "dummy": frames[-1:],
            "mid": chunk,
        }[self.kind.get(self.key(stream))]
        stream.rows = [row for row in stream.rows if row.frame in kept]

    def event(self, event, streams, step):
        if event.kind != "prompt_switch":
            return None
        self.again |= {self.key(stream) for stream in streams}
        return Rebuild(tuple(range(max(0, step.start - self.window), step.start)))

    def open(self, stream, step, q):
        if self.key(stream) in self.again:
            self.again.discard(self.key(stream))
            self.split(stream)

    @staticmethod
    def key(stream):
        return stream.namespace, stream.sample, stream.layer, stream.head

    @staticmethod
    def sample(stream):
        return stream.namespace, stream.sample


def policy(**settings):
    return policy_from_dict({"name": "x", "retain": {"part": "dummy-forcing", **settings}})


SWITCH = Event("prompt_switch", 12, "another")
CASES = {
    "three frames": ({}, chunked([3] * 14, noisy=1), {"heads": 4, "batch": 2, "grid": (1, 2)}),
    "single frames": ({}, chunked([1] * 14, noisy=1), {"heads": 5, "batch": 2, "grid": (3, 2)}),
    "pairs, a given chunk": (
        {"dummy": 0.25},
        chunked([2] * 14, noisy=1, context=1),
        {"heads": 3, "layers": 3, "batch": 2, "grid": (1, 3)},
    ),
    "short last chunk, decided in given chunks": (
        {"dummy": 0.4},
        chunked([4] * 13 + [2], noisy=1, context=3),
        {"heads": 4, "batch": 2, "grid": (1, 2)},
    ),
    "decided later": (
        {"ar_start": 2},
        chunked([3] * 14, noisy=1),
        {"heads": 4, "batch": 2, "grid": (1, 2)},
    ),
    "released rule": (
        {"ar_start": 2, "first_tokens": "paper"},
        chunked([3] * 14, noisy=1),
        {"heads": 4, "batch": 2, "grid": (2, 1), "seed": 1},
    ),
    "few queries": (
        {"ar_start": 3, "queries": 4},
        chunked([2] * 14, noisy=1),
        {"heads": 4, "batch": 2, "grid": (2, 2)},
    ),
    "guided": (
        {"dummy": 0.35},
        guided(chunked([1] * 14, noisy=1)),
        {"heads": 4, "batch": 2, "grid": (2, 2)},
    ),
    "several chunks in flight": (
        {},
        rolling(2, 28, 3),
        {"heads": 4, "batch": 2, "grid": (1, 2)},
    ),
    "prompt switches": (
        {"window": 5},
        chunked([2] * 14, noisy=1),
        {
            "heads": 4,
            "batch": 2,
            "grid": (1, 3),
            "events": (Event("prompt_switch", 2, "a"), SWITCH, Event("prompt_switch", 20, "b")),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(3)
def test_every_decision_is_the_twins(case):
    """Over 14 chunks; in float64, where rounding tells no two heads apart."""
    settings, steps, world = CASES[case]
    tape = random_tape(steps, dtype=torch.float64, **world)
    found = compare_decisions(policy(**settings), DummyScript(**settings), tape)
    assert found.total >= 200
    assert found.equal == found.total


@pytest.mark.parametrize("case", ["decided later", "prompt switches"])
def test_outputs_and_rows_are_the_twins(case):
    settings, steps, world = CASES[case]
    tape = random_tape(steps, **world | {"batch": 1})
    script = DummyScript(**settings)
    assert_same_as_twin(policy(**settings), script, tape)
    assert len(set(script.kind.values())) == 3


def held_frames(session, heads):
    """Frames of each head of the first layer."""
    table = session.samples[0].stores["cond"][0].table
    return [sorted({int(r.frame) for r in held_rows(table, head)}) for head in range(heads)]


def looking_at(frames_of_heads):
    """A tape in which each head's queries look at some frames, along the slowest rotation."""
    tape = random_tape(chunked([3] * 5, noisy=1), layers=1, heads=len(frames_of_heads))
    entries = []
    for entry in tape.entries:
        q, k, v = (torch.zeros_like(x) for x in entry.layers[0])
        q[..., 2], tokens = 20.0, tape.geometry.tokens
        for i, frame in enumerate(entry.step.frames):
            for head, frames in enumerate(frames_of_heads):
                k[:, i * tokens : (i + 1) * tokens, head, 2] = float(frame in frames)
        entries.append(replace(entry, layers=((q, k, v),)))
    return replace(tape, entries=tuple(entries))


def test_the_worked_example():
    """Heads that look at frame 0, at frames 1 and 2, at their own chunk, and at nothing."""
    tape = looking_at([[0], [1, 2], range(3, 15), []])
    session, seen = tape.session(preset("dummy-forcing")), []
    for step, _ in tape.running(session):
        if step.final:
            seen.append(held_frames(session, 4))
    # head 3 shares its mass evenly, so it looks back more than head 2; both less than the others
    assert seen == [
        [[0, 1, 2]] * 4,
        [[0], [3, 4, 5], [5], [5]],
        [[0], [6, 7, 8], [8], [8]],
        [[0], [9, 10, 11], [11], [11]],
        [[0], [12, 13, 14], [14], [14]],
    ]


def test_the_released_rule_counts_a_chunk_of_frames_as_first():
    """With ``ar_start`` 2 the keys are 0 | 3, 4, 5 and, released, 0, 3, 4 | 5."""
    tape = looking_at([[4], [5], [0], range(6, 15)])
    for rule, kind in (("frame", [9, 10, 11]), ("paper", [0])):
        made = policy(ar_start=2, first_tokens=rule, dummy=0.25)
        session, seen = tape.session(made), []
        for step, _ in tape.running(session):
            if step.final:
                seen.append(held_frames(session, 4))
        assert seen[1] == [[0, 3, 4, 5]] * 4
        assert seen[3] == [kind, [9, 10, 11], [0], [11]]


def test_equal_heads_are_dummy_from_the_lowest():
    tape = looking_at([[0]] * 4)
    session = tape.session(preset("dummy-forcing"))
    for _ in tape.running(session):
        pass
    assert held_frames(session, 4) == [[14], [14], [0], [0]]


def test_after_a_switch_first_heads_keep_the_oldest_frame_encoded_again():
    tape = looking_at([[0], [1, 2], range(3, 15), []])
    entries = [
        replace(entry, events=(Event("prompt_switch", 9, "new"),))
        if entry.step.start == 9 and entry.step.opens
        else entry
        for entry in tape.entries
    ]
    tape, seen = replace(tape, entries=tuple(entries)), {}
    session = tape.session(policy(window=6))
    for step, _ in tape.running(session):
        seen[step.start, step.phase] = held_frames(session, 4)
    assert seen[9, "denoise"] == [[3], [6, 7, 8], [8], [8]]
    assert seen[9, "commit"] == [[3], [9, 10, 11], [11], [11]]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dummy": 1.5}, "dummy"),
        ({"ar_start": 0}, "ar_start"),
        ({"first_tokens": "chunk"}, "first_tokens"),
        ({"window": 0}, "window"),
        ({"budget": "9f"}, "takes no budget"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy(**settings)
