"""MemRoPE's two running means against plain Python, and the cache of twelve frames."""

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
from lightning_kv.testing.twin import Row


class MemScript(Script):
    """A list of frames: sink, long, short, recent; what leaves recent goes into the means."""

    def __init__(self, budget, sink=3, long=0.01, short=0.1, adaptive=False, mean="place"):
        self.budget, self.rate = budget, (long, short)
        self.sink = sink if isinstance(sink, int) else round(sink * budget)
        self.adaptive, self.mean, self.begun, self.events = adaptive, mean, set(), 0

    def commit_all(self, streams, step):
        for layer in sorted({stream.layer for stream in streams}):
            self.layer([stream for stream in streams if stream.layer == layer])

    def layer(self, streams):
        frames = sorted({row.frame for row in streams[0].rows})
        over = len(frames) - self.budget
        if over <= 0:
            return
        one = streams[0]
        name = one.namespace, one.sample, one.layer
        long, short, *recent = frames[self.sink :]
        gone, first = recent[:over], name not in self.begun
        means = [self.means(stream, gone) for stream in streams]
        rates = self.rates(streams, means, short)
        for stream, mean in zip(streams, means, strict=True):
            made = []
            for memory, rate in zip((long, short), rates, strict=True):
                for place, (k, v) in mean.items():
                    old = self.at(stream, memory, place)
                    a = 1.0 if first else rate[place]
                    k2, v2 = (a * m + (1 - a) * o for m, o in ((k, old.k), (v, old.v)))
                    spot = divmod(place, stream.geometry.grid[1])
                    made.append(Row(memory, float(memory), spot, k2, v2))
            dropped = (long, short, *gone)
            stream.rows = [row for row in stream.rows if row.frame not in dropped] + made
        self.begun.add(name)
        self.events += 1

    @staticmethod
    def at(stream, frame, place):
        """The row of a frame at a place."""
        spots = (place, tuple(map(float, divmod(place, stream.geometry.grid[1]))))
        return next(r for r in stream.rows if r.frame == frame and r.place in spots)

    def means(self, stream, gone):
        """Key and value at each place, averaged over frames, or over everything."""
        tokens, found = stream.geometry.tokens, {}
        for place in range(tokens):
            places = range(tokens) if self.mean == "frame" else [place]
            rows = [self.at(stream, f, p) for f in gone for p in places]
            found[place] = tuple(sum(getattr(r, x) for r in rows) / len(rows) for x in "kv")
        return found

    def rates(self, streams, means, short):
        tokens = streams[0].geometry.tokens
        rates = [[rate] * tokens for rate in self.rate]
        if self.adaptive:
            motion = []
            for place in range(tokens):
                far = [
                    float((mean[place][0] - self.at(stream, short, place).k).norm())
                    for stream, mean in zip(streams, means, strict=True)
                ]
                motion.append(sum(far) / len(far))
            rates[1] = [self.rate[1] * (0.1 + 4.9 * m / max(motion)) for m in motion]
        return rates

    def time(self, stream, step, row):
        """Side by side, right before the chunk."""
        frames = sorted({r.frame for r in stream.rows}, reverse=True)
        return step.query_times[0] - 1 - frames.index(row.frame)


def policy(budget, **settings):
    retain = {"part": "mem-rope", "budget": f"{budget}f", "sink": 3, **settings}
    return load_policy({"name": "x", "retain": retain, "positions": "contiguous"})


WORLD = {"heads": 2, "batch": 2, "grid": (1, 2)}
SWITCH = (Event("prompt_switch", 12, "another"), Event("scene_cut", 20))
CASES = {
    "threes": ({"sink": 0.333}, 9, chunked([3] * 14, noisy=1), WORLD | {"layers": 1}),
    "single frames": ({"sink": 1}, 5, chunked([1] * 14, noisy=1), WORLD | {"grid": (3, 2)}),
    "adaptive, pairs": (
        {"adaptive": True}, 7, chunked([2] * 14, noisy=1), WORLD | {"batch": 1, "grid": (2, 2)},
    ),
    "of the frame, fours, short last": (
        {"mean": "frame", "sink": 0}, 6, chunked([4] * 13 + [1], noisy=1), WORLD | {"batch": 1},
    ),
    "other first chunk, events": (
        {"long": 0.3}, 6, chunked([1] + [3] * 13, noisy=1), WORLD | {"events": SWITCH},
    ),
    "guided, given chunks": (
        {"sink": 2}, 6, guided(chunked([2] * 14, noisy=1, context=2)), WORLD | {"batch": 1},
    ),
    "several chunks in flight": ({}, 6, rolling(2, 28, 2), WORLD | {"batch": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.thinned(7)
def test_every_decision_is_the_twins(case):
    settings, budget, steps, world = CASES[case]
    script = MemScript(budget, **settings)
    tape = random_tape(steps, dtype=torch.float64, **world)
    found = compare_decisions(policy(budget, **settings), script, tape, ("kept", "read"))
    assert found.equal == found.total >= 200
    assert script.events > 2 * len(script.begun)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_rows_are_the_twins(case):
    settings, budget, steps, world = CASES[case]
    tape = random_tape(steps[:24], **world | {"batch": 1, "layers": 1})
    assert_same_as_twin(policy(budget, **settings), MemScript(budget, **settings), tape)


def test_the_cache_of_twelve_frames():
    """Frames 3 and 4 are lost when the means begin in their places; then one chunk at a time."""
    tape = random_tape(chunked([3] * 6, noisy=0), layers=1, dtype=torch.float64)
    session, seen = tape.session(preset("mem-rope")), {}
    values = torch.cat([entry.layers[0][2][0] for entry in tape.entries]).transpose(0, 1)
    values = values.unflatten(1, (-1, tape.geometry.tokens))  # [H, frames, T, D]
    for step, _ in tape.running(session):
        table = session.samples[0].stores["cond"][0].table
        rows = {f: table.values()[:, (table.frame_id == f)[0]] for f in table.frames}
        seen[step.start] = table.frames, rows
    assert seen[6][0] == tuple(range(9))
    assert seen[9][0] == (0, 1, 2, 3, 4, 8, 9, 10, 11)
    assert seen[12][0] == (0, 1, 2, 3, 4, 11, 12, 13, 14)
    begun, moved = values[:, 5:8].mean(1), values[:, 8:11].mean(1)
    for memory, rate in ((3, 0.01), (4, 0.1)):
        torch.testing.assert_close(seen[9][1][memory], begun)
        torch.testing.assert_close(seen[12][1][memory], rate * moved + (1 - rate) * begun)


@pytest.mark.parametrize(("frames", "sink"), [(4, 1), (6, 2), (9, 3), (15, 5)])
def test_the_sink_is_a_share_of_the_budget(frames, sink):
    tape = random_tape(chunked([1] * (frames + 3), noisy=0), layers=1, heads=1, grid=(1, 1))
    session = tape.session(preset(f"mem-rope@{frames}f"))
    tape.play(session)
    held = session.samples[0].stores["cond"][0].table.frames
    assert held == (*range(sink + 2), *range(sink + 5, frames + 3))


def test_a_rate_of_one_keeps_the_last_frames_that_left():
    tape = random_tape(chunked([1] * 9, noisy=0), layers=1, dtype=torch.float64)
    session = tape.session(policy(4, sink=1, long=1.0, short=1.0))
    tape.play(session)
    table = session.samples[0].stores["cond"][0].table
    for memory in (1, 2):
        found = table.values()[:, (table.frame_id == memory)[0]]
        torch.testing.assert_close(found, tape.entries[7].layers[0][2][0].transpose(0, 1))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sink": -1}, "sink"),
        ({"sink": 1.5}, "sink"),
        ({"long": 1.5}, "long"),
        ({"mean": "global"}, "place, frame"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        policy(9, **settings)
